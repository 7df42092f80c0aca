"""Accuracy by bit width in natural training: the rows of docs/results/widths.md.

    python -m benchmarks.widths --data cifar10 [--rows float w4a4 w4a4-fixed w1a1] [--images 10000] [--epochs 10]

Each row is a network trained from scratch by the recipe ``natural`` with the same schedule, images and seed. Rows
``...-fixed`` keep the calibrated activation scales; the others learn them. Prints one JSON line per row, and the table.
Add ``--set flip=true`` for CIFAR-10 in an .npz.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import head, make_parser, percent, row
from robustq import progress
from robustq.data import load_dataset
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe
from robustq.workflow.job import Job
from robustq.workflow.training_run import run_recipe

ROWS = {
    "float": (32, 32),
    "w8a8": (8, 8),
    "w4a4": (4, 4),
    "w4a4-fixed": (4, 4),
    "w2a2": (2, 2),
    "w2a2-fixed": (2, 2),
    "w1a1": (1, 1),
}


def main() -> None:
    """Train the rows and print them."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["float", "w4a4", "w4a4-fixed", "w1a1"])
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more recipe keys, for every row")
    options = parser.parse_args()
    progress.show(True)
    recipe = load_recipe("natural", (f"train_images={options.images}", f"epochs={options.epochs}", *options.set))
    data = load_dataset(options.data, train_images=options.images)
    found = {}
    for name in options.rows:
        found[name] = _train(name, data, recipe, architecture=options.architecture, seed=options.seed)
        print(json.dumps({"row": name, **found[name]}), flush=True)
    head("network", "test accuracy [95%]", "epochs", "s an epoch")
    for name, result in found.items():
        accuracy = percent(result["clean_accuracy"], result["clean_interval"])
        row(name, accuracy, result["epochs"], f"{result['seconds_per_epoch']:.0f}")


def _train(name: str, data: Any, recipe: Any, *, architecture: str, seed: int) -> dict[str, Any]:
    weight_bits, act_bits = ROWS[name]
    shape = (data.classes, data.channels, data.image_size)
    spec = ModelSpec(architecture, weight_bits, act_bits, *shape, data.name, None, data.class_names)
    torch.manual_seed(seed)
    model = build_model(spec)
    for threshold in learned_thresholds(model).values():
        threshold.log_threshold.requires_grad_(not name.endswith("fixed"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        job = Job(spec=spec, data=data, recipe=recipe, seed=seed, device=device, out=out, source=None)
        return run_recipe(model, job).to_dict()


if __name__ == "__main__":
    main()
