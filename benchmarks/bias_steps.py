"""What folding's bias rounding changes, with biases in the accumulator's own steps and in finer ones.

    python -m benchmarks.bias_steps [--epochs 10] [--seeds 0 1 2]

ResNet-8 on the digits, trained naturally from scratch at each width, folded in both ways: test images whose answer
folding changes, and the mean logit difference as a share of the logit range.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch

from robustq.data import load_dataset, to_float
from robustq.export.parity import Agreement, drift
from robustq.models.folding import fold
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe
from robustq.workflow.run import run_recipe


def main() -> None:
    """Train, fold twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    print("| bits | seed | accumulator's steps: answers changed, logits | finer steps: answers changed, logits |")
    print("|---|---|---|---|")
    for bits in (8, 4, 3, 2):
        for seed in options.seeds:
            coarse, fine = _drifts(bits, seed=seed, epochs=options.epochs)
            print(f"| {bits} | {seed} | {_shown(coarse)} | {_shown(fine)} |", flush=True)


def _drifts(bits: int, *, seed: int, epochs: int) -> tuple[Agreement, Agreement]:
    data = load_dataset("digits")
    spec = ModelSpec("resnet8", bits, bits, data.classes, data.channels, data.image_size, "digits", None, ())
    torch.manual_seed(seed)
    model = build_model(spec)
    recipe = load_recipe("natural", (f"epochs={epochs}",))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_recipe(model, spec, data, recipe, seed=seed, device=torch.device("cpu"), out=out, source=None)
    images, _ = data.test.take(0)
    with mock.patch("robustq.models.folding.bias_steps", return_value=1):
        coarse = fold(model, spec)
    return drift(model, coarse, to_float(images)), drift(model, fold(model, spec), to_float(images))


def _shown(found: Agreement) -> str:
    return f"{found.different_top1} of {found.images}, {found.mean_difference:.1e}"


if __name__ == "__main__":
    main()
