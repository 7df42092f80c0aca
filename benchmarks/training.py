"""What a training step costs: plain float torch, 4-bit natural and 4-bit ODG-Q, interleaved in one run.

    python -m benchmarks.training [--architecture resnet20] [--bits 4] [--batch 128] [--rounds 5] [--steps 3]

Every round times the same number of steps of each kind, one kind after the other, on the same random images (times do
not depend on what is in them). Printed: the median step of each kind, and the ratios, each the median over rounds of
the ratio within one round, so that a machine that slows down for a while spoils one round and not the result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from robustq.hardening.methods.registry import build_method
from robustq.hardening.optimizer import build_optimizer
from robustq.models.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    x = torch.randint(0, 256, (options.batch, 3, 32, 32), device=device).float() / 255.0
    y = torch.randint(0, 10, (options.batch,), device=device)
    places = torch.arange(options.batch, device=device)
    kinds = {
        "float": _float_step(options.architecture, x, y),
        "natural": _method_step("natural", options.architecture, options.bits, x, y, places),
        "odgq": _method_step("odgq", options.architecture, options.bits, x, y, places),
    }
    for step in kinds.values():
        step()  # allocations and kernel choices of the first step are nobody's cost
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, step in kinds.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            _wait(device)
            seconds[kind].append((time.perf_counter() - start) / options.steps)
    print(
        f"{options.architecture}, {options.bits} bits, batch {options.batch}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{options.rounds} rounds of {options.steps} steps"
    )
    for kind, values in seconds.items():
        print(f"{kind:8s} {statistics.median(values) * 1000:8.1f} ms a step (median of {len(values)} rounds)")
    for above, below in (("natural", "float"), ("odgq", "natural"), ("odgq", "float")):
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        print(f"{above} / {below} = {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def _float_step(architecture: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model = build_model(_spec(architecture, 32)).to(x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _method_step(
    name: str, architecture: str, bits: int, x: torch.Tensor, y: torch.Tensor, places: torch.Tensor
) -> Callable[[], None]:
    recipe = load_recipe(name, (f"batch_size={len(x)}", "lr=0.01"))
    model = build_model(_spec(architecture, bits)).to(x.device)
    calibrate(model, x, from_scratch=True)
    model.train()
    method = build_method(
        recipe, model, epsilon=8 / 255, image_shape=(3, 32, 32), samples=len(x), device=x.device, seed=0
    )
    optimizer = build_optimizer(model, recipe)

    def step() -> None:
        for _ in range(method.repeats):
            x_adv = method.perturb(x, y, places)
            outcome = method.loss(x, x_adv, y, places)
            optimizer.zero_grad(set_to_none=True)
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            method.after_backward(x_adv)
            optimizer.step()

    return step


def _spec(architecture: str, bits: int) -> ModelSpec:
    return ModelSpec(architecture, bits, bits, 10, 3, 32, "cifar10", None, ())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
