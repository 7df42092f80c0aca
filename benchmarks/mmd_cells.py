"""Effect of lambda: settings of ODG-Q on a slice of CIFAR-10, each trained and attacked in the same way.

    python -m benchmarks.mmd_cells --data cifar10 --cells natural fgsm-rs lambda-3 lambda-0 --out cells.jsonl
    python -m benchmarks.mmd_cells --measure MODEL.pt ...

`lambda-3` has the settings of an earlier experiment: float ResNet-20 from scratch, one-cycle learning rate (linear up
over 30%, cosine down) to 0.1, square root of MMD^2 with the mean bandwidth, gradient through the clean branch,
BatchNorm in train mode, epsilon_l = epsilon, no clamp. The names of the others say how they differ. Rows are appended
to ``--out``; cells that it holds are not trained again. ``--measure`` evaluates networks that exist.

Measured on test images at 8/255: clean, FGSM, PGD-20 with steps of 2/255 and margin-PGD-40 (last iterates), their worst
case, and signs of masking: norm of the pooled features, logit margin, gradient norm, share of zero gradients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.output import head, make_parser, row
from robustq import progress
from robustq.attacks import ImageGenerators, fgsm, pgd
from robustq.attacks.losses import margin
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.evaluation.accuracy import correct
from robustq.hardening.monitor import inspect_network
from robustq.workflow.train import train_model

EPSILON = 8 / 255
STEP = 2 / 255
BATCH = 250

_RANDOM: dict[str, Callable[..., Tensor]] = {
    "pgd20": partial(pgd, steps=20, step_size=STEP),
    "margin_pgd40": partial(pgd, steps=40, step_size=STEP, loss=margin),
}

_PROTOTYPE = (
    *("odgq.mmd_weight=3", "odgq.estimator=root", "odgq.bandwidth=mean", "odgq.natural_gradient=true"),
    *("odgq.batch_norm=train", "odgq.clamp=false"),
)

CELLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "natural": ("natural", ()),
    "fgsm-rs": ("fgsm-rs", ()),
    "lambda-3": ("odgq", _PROTOTYPE),
    "lambda-0": ("odgq", (*_PROTOTYPE, "odgq.mmd_weight=0")),
    "lambda-30": ("odgq", (*_PROTOTYPE, "odgq.mmd_weight=30")),
    "squared": ("odgq", (*_PROTOTYPE, "odgq.estimator=squared")),
    "mixture": ("odgq", (*_PROTOTYPE, "odgq.bandwidth=mixture")),
    "unpooled": ("odgq", (*_PROTOTYPE, "odgq.features=unpooled")),
    "logits": ("odgq", (*_PROTOTYPE, "odgq.features=logits")),
    "x0-detached": ("odgq", (*_PROTOTYPE, "odgq.natural_gradient=false")),
    "clipped-P": ("odgq", (*_PROTOTYPE, "odgq.clip_stored=true")),
    "clipped-P-lambda-0": ("odgq", (*_PROTOTYPE, "odgq.clip_stored=true", "odgq.mmd_weight=0")),
    "quarter-local": ("odgq", (*_PROTOTYPE, "odgq.local_scale=0.25")),
    "quarter-local-lambda-0": ("odgq", (*_PROTOTYPE, "odgq.local_scale=0.25", "odgq.mmd_weight=0")),
    "half-local": ("odgq", (*_PROTOTYPE, "odgq.local_scale=0.5")),
    "defaults": ("odgq", ()),
    "defaults-with-gradient": ("odgq", ("odgq.natural_gradient=true",)),
    "defaults-train-norm": ("odgq", ("odgq.batch_norm=train",)),
    "defaults-lambda-0": ("odgq", ("odgq.mmd_weight=0",)),
}
"""Name -> recipe, and its changed keys."""


def main() -> None:
    """Train missing cells and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=14, help="natural training: 10/14 of them")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cells.jsonl"), help="JSON lines of finished cells")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="MODEL", help="evaluate networks, train none")
    options = parser.parse_args()
    progress.show(True)
    if options.measure:
        _print([{"cell": str(path), **_measured(path, options), "seconds_per_epoch": 0.0} for path in options.measure])
        return
    rows = _read(options.out)
    for cell in options.cells:
        if cell not in rows:
            rows[cell] = {"cell": cell, **_settings(options), **_row(cell, options)}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[cell]) + "\n")
        elif {key: rows[cell][key] for key in _settings(options)} != _settings(options):
            raise SystemExit(f"{options.out} holds {cell} with other settings; give another --out")
    _print([rows[cell] for cell in options.cells])


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("architecture", "bits", "images", "epochs", "test_images", "seed")}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["cell"]: line for line in lines}


def _row(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    recipe, own = CELLS[cell]
    epochs = round(options.epochs * 10 / 14) if recipe == "natural" else options.epochs
    schedule = ("schedule=cosine", "lr=0.1", f"epochs={epochs}", f"warmup_epochs={0.3 * epochs:.2f}", "batch_size=128")
    data = ("crop_padding=4", "flip=true", f"train_images={options.images}", "monitor_images=200")
    with tempfile.TemporaryDirectory() as folder:
        trained = train_model(
            recipe,
            overrides=(*schedule, *data, *own),
            data=options.data,
            architecture=options.architecture,
            bits=options.bits,
            seed=options.seed,
            out=Path(folder) / "run",
        )
        # The earlier experiment measured the last epoch.
        found = _measured(Path(folder) / "run" / "last.pt", options)
    return {**found, "epochs_trained": epochs, "seconds_per_epoch": trained["seconds_per_epoch"]}


def _measured(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    network, _, _ = load_model(path)
    images, labels = load_dataset(options.data).test.take(options.test_images)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return measure(network.eval().to(device), to_float(images.to(device)), labels.to(device), seed=options.seed)


def measure(model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> dict[str, Any]:
    """Accuracies in [0, 1] and signs of masking of a network in eval mode; `seed` is that of the random starts."""
    generators = ImageGenerators.of(seed, range(len(x)))
    right = {"clean": correct(model, x, y, batch_size=BATCH)}
    for name, attack in {"fgsm": fgsm, **_RANDOM}.items():
        found = []
        for rows in torch.split(torch.arange(len(x)), BATCH):
            more = {"generator": generators.child(name)[rows]} if name in _RANDOM else {}
            found.append(attack(model, x[rows], y[rows], epsilon=EPSILON, **more))
        right[name] = correct(model, torch.cat(found), y, batch_size=BATCH)
    worst = torch.stack(list(right.values())).all(dim=0)
    accuracies = {name: float(kept.float().mean()) for name, kept in right.items()}
    return {**accuracies, "worst": float(worst.float().mean()), **asdict(inspect_network(model, x, y))}


_COLUMNS = {
    **{"clean": "clean", "fgsm": "FGSM", "pgd20": "PGD-20", "margin_pgd40": "margin-PGD-40", "worst": "worst case"},
    **{"feature_norm": "feature norm", "logit_margin": "logit margin", "input_gradient_norm": "gradient norm"},
    "zero_gradients": "zero gradients",
}
_SHARES = {"clean", "fgsm", "pgd20", "margin_pgd40", "worst", "zero_gradients"}


def _print(rows: list[dict[str, Any]]) -> None:
    head("cell", *_COLUMNS.values(), "s an epoch")
    for found in rows:
        values = [f"{100 * found[key]:.1f}" if key in _SHARES else f"{found[key]:.3g}" for key in _COLUMNS]
        row(found["cell"], *values, f"{found['seconds_per_epoch']:.0f}")


if __name__ == "__main__":
    main()
