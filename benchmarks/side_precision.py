"""Attack generation in other precisions of the auxiliary pass.

    python -m benchmarks.side_precision MODEL ... --data cifar10 [--images 512] [--epsilon 8]

One step of epsilon along the sign of the input gradient, as in line 7 of ODG-Q, with BatchNorm's running statistics.
For each precision: the share of signs that differ from float32, the gradient there relative to its mean, the cosine of
the gradients, and the float32 loss of the generated images.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.output import head, make_parser, row
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.hardening.methods.method import attack_generation
from robustq.hardening.precision import in_precision
from robustq.models.quant.integer_convolution import IntegerConvolutions, is_available
from robustq.models.quant.shared_weights import SharedWeights
from robustq.recipe.schema import BFLOAT16, FLOAT32, INTEGER


def main() -> None:
    """Generate attacks in every precision and print the tables."""
    parser = make_parser(__doc__)
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
        head("precision", "other signs", "gradient there / mean", "cosine", "loss of the images")
        exact = _gradient(model, layers, x, y, FLOAT32)
        for precision in (FLOAT32, BFLOAT16, *([INTEGER] if is_available() and len(layers) else [])):
            found = _gradient(model, layers, x, y, precision)
            other = found.sign() != exact.sign()
            size = float(exact[other].abs().mean() / exact.abs().mean()) if bool(other.any()) else 0.0
            # In float64: sums of half a million products.
            cosine = functional.cosine_similarity(found.double().flatten(), exact.double().flatten(), dim=0)
            x_adv = (x + epsilon * found.sign()).clamp(0.0, 1.0)
            share = f"{100 * float(other.float().mean()):.2f}%"
            row(precision, share, f"{size:.3f}", f"{float(cosine):.5f}", f"{_loss(model, x_adv, y):.4f}")


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
