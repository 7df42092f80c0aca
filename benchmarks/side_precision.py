"""What an image is crafted to when the pass that crafts it computes in another precision.

    python -m benchmarks.side_precision MODEL ... --data cifar10 [--images 512] [--epsilon 8]

One step of epsilon along the sign of the loss' input gradient, as ODG-Q's line 7 takes it, on a network as a training
step has it (running statistics in BatchNorm). For each precision: the share of signs that are not those of float32, how
large the gradient is there beside its mean, the cosine of the two gradients, and the loss of the crafted images, always
in float32: what matters of a precision is whether they are as hard.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.hardening.methods.method import attack_generation
from robustq.hardening.precision import in_precision
from robustq.models.quant.integer_convolution import IntegerConvolutions, is_available
from robustq.models.quant.shared_weights import SharedWeights
from robustq.recipe.schema import BFLOAT16, FLOAT32, INTEGER


def main() -> None:
    """Craft in every precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--epsilon", type=float, default=8.0, help="of 255")
    options = parser.parse_args()
    pixels, y = load_dataset(options.data).test.take(options.images)
    x, epsilon = to_float(pixels), options.epsilon / 255
    for path in options.models:
        model, spec, _ = load_model(path)
        model = model.to(memory_format=torch.channels_last).train()
        layers = IntegerConvolutions(model, x[:2])
        print(f"{spec.label}, {len(x)} images, epsilon {options.epsilon:g}/255: loss {_loss(model, x, y):.4f}")
        print("| precision | other signs | gradient there / mean | cosine | loss of what is crafted |")
        print("|---|---|---|---|---|")
        exact = _gradient(model, layers, x, y, FLOAT32)
        for precision in (FLOAT32, BFLOAT16, *([INTEGER] if is_available() and len(layers) else [])):
            found = _gradient(model, layers, x, y, precision)
            other = found.sign() != exact.sign()
            size = float(exact[other].abs().mean() / exact.abs().mean()) if bool(other.any()) else 0.0
            # Whole sums in float64: half a million products.
            cosine = functional.cosine_similarity(found.double().flatten(), exact.double().flatten(), dim=0)
            crafted = (x + epsilon * found.sign()).clamp(0.0, 1.0)
            print(
                f"| {precision} | {100 * float(other.float().mean()):.2f}% | {size:.3f} | {float(cosine):.5f} | "
                f"{_loss(model, crafted, y):.4f} |",
                flush=True,
            )


def _gradient(model: nn.Module, layers: IntegerConvolutions, x: Tensor, y: Tensor, precision: str) -> Tensor:
    whole = layers.in_place() if precision == INTEGER else nullcontext()
    computing = in_precision(model, FLOAT32, side=precision)
    with SharedWeights(model).quantized_once(), whole, computing, attack_generation(model, "eval"):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y), leaf)
    return gradient


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with attack_generation(model, "eval"):
        return float(functional.cross_entropy(model(x), y))


if __name__ == "__main__":
    main()
