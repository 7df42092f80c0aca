r"""Honestly trained networks under suite `standard`: no flag may rise (docs/results/honest-networks.md).

    python -m benchmarks.honest_networks --out honest-digits.jsonl
    python -m benchmarks.honest_networks --data cifar10.npz --epsilon 8/255 --images 300 --set train_images=5000 \
        --out honest-cifar.jsonl

Trains a small ResNet from scratch with every method at every width and seed, briefly, and attacks it with the natural
network of the same seed as control and surrogate. One JSON line per network in the file, which a later call goes on
with; the table of all of its lines is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.output import head, make_parser, percent, row
from robustq.evaluation.run_suite import run_suite
from robustq.evaluation.target import Target
from robustq.workflow.open_model import open_attackable
from robustq.workflow.prepared_target import prepared_target
from robustq.workflow.setup import data_for, pick_device
from robustq.workflow.surrogates import OtherNetworks
from robustq.workflow.train import train_model

METHODS = ("n-fgsm", "pgd", "odgq", "fgsm-rs", "trades")
WIDTHS = (32, 4, 8, 2)


def main() -> None:
    """Train, attack, print."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--architecture", help="default: resnet8 on the digits, else resnet20")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="bits")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--epsilon", default="32/255", help="of training and attack")
    parser.add_argument("--images", type=int, default=0, help="to attack; 0: all test images")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for seed, bits, method in missing(options):
        with tempfile.TemporaryDirectory() as folder:
            line = {"seed": seed, "bits": bits, "method": method, **one(options, Path(folder), seed, bits, method)}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    table(lines(options.out))


def lines(path: Path) -> list[dict[str, Any]]:
    """The networks that are done."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def missing(options: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Seed, bits and method of the networks that are left to do."""
    done = {(line["seed"], line["bits"], line["method"]) for line in lines(options.out)}
    wanted = ((seed, bits, method) for seed in options.seeds for bits in options.widths for method in options.methods)
    return (each for each in wanted if each not in done)


def one(options: argparse.Namespace, folder: Path, seed: int, bits: int, method: str) -> dict[str, Any]:
    """Train a network and its control, and attack it."""
    own = folder / "own"
    control = Path(f"{options.out}.control-{seed}")
    settings = [f"epochs={options.epochs}", f"epsilon={options.epsilon}", "batch_size=128", "lr=0.1"]
    settings += ["crop_padding=1"] if options.data == "digits" else ["crop_padding=4", "flip=true"]
    settings += options.set
    architecture = options.architecture or ("resnet8" if options.data == "digits" else "resnet20")
    shared: dict[str, Any] = {"data": options.data, "architecture": architecture, "overrides": tuple(settings)}
    if not control.exists():
        train_model("natural", bits=32, seed=1000 + seed, out=control, **shared)
    train_model(method, bits=bits, seed=seed, out=own, **shared)
    device = pick_device(None)
    opened = open_attackable(own / "best.pt", device=device)
    data = data_for(opened.spec, options.data, opened.checkpoint, skip_bad_images=False)
    images, labels = data.test.take(options.images)
    others = OtherNetworks(data, None, device)
    natural = others.load(control / "best.pt")
    target: Target = replace(
        opened.target(), surrogates={**others.requantized(opened), "natural": natural}, control=natural
    )
    epsilon = opened.spec.epsilon or 0.0
    with prepared_target(target, opened.differentiable, images, compiled=False) as prepared:
        found = run_suite(prepared, images, labels, epsilon=epsilon, device=device, seed=seed).to_dict()
    keys = ("images", "epsilon", "clean_accuracy", "robust_accuracy", "interval", "suspected", "verdict")
    return {
        **{key: found[key] for key in keys},
        "flags": [f"{flag['name']}: {flag['text']}" for flag in found["flags"]],
    }


def table(found: list[dict[str, Any]]) -> None:
    """Print all networks, and the number of those with flags."""
    head("method", "bits", "seed", "images", "clean", "robust [95%]", "flags raised", "suspected")
    for line in sorted(found, key=lambda one: (one["method"], -one["bits"], one["seed"])):
        robust = percent(line["robust_accuracy"], line["interval"])
        told = "; ".join(line["flags"]) or "none", ", ".join(line["suspected"]) or "none"
        row(
            line["method"],
            line["bits"],
            line["seed"],
            line["images"],
            f"{100 * line['clean_accuracy']:.1f}",
            robust,
            *told,
        )
    raised, suspected = (sum(bool(line[key]) for line in found) for key in ("flags", "suspected"))
    print(f"\n{len(found)} networks, {raised} with a raised flag, {suspected} with a suspected one")


if __name__ == "__main__":
    main()
