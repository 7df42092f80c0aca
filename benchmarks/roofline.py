"""Training steps against the machine's measured arithmetic and memory rates.

    python -m benchmarks.roofline [--architecture resnet20] [--bits 4] [--batch 128] [--device cpu] [--kinds KIND ...]

Counted on a forward pass: multiplications and additions of convolutions and linear layers (2 N C_out H W C_in k^2), and
the bytes of every layer's input and output. The backward pass has twice the operations (inputs and weights) and three
times the bytes (tensors and gradients). The optimizer and the weights, about a hundredth, are left out.

Measured in the same run: the rates of a large matrix product and of a copy, and the step. `arithmetic` and `memory` are
the shortest times at these rates; without overlap a step needs their sum. Fused layers count separately, so `memory` of
a compiled step is an upper bound.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from robustq.cli.process import prepare

prepare()  # before torch is loaded, as in the program

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.output import make_parser  # noqa: E402
from benchmarks.training import model_spec, step_of, wait  # noqa: E402
from robustq.models.spec import build_model  # noqa: E402

BACKWARD_OPERATIONS = 2
BACKWARD_BYTES = 3
_KINDS = {"natural": (1, 1), "odgq": (3, 2), "compiled": (1, 1), "compiled-odgq": (3, 2)}
"""Forward and backward passes of a step. The backward of attack generation has half the operations."""


def main() -> None:
    """Count, measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=["natural", "odgq"])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    operations, traffic = count_forward(options.architecture, options.bits, options.size)
    flops, bandwidth = _product_rate(device), _copy_rate(device)
    print(
        f"{options.architecture}, {options.bits} bits, batch {options.batch}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"a matrix product reaches {flops / 1e9:,.0f} GFLOP/s, a copy {bandwidth / 1e9:,.1f} GB/s")
    moved = sum(traffic.values())
    shares = ", ".join(f"{name} {value / moved:.0%}" for name, value in traffic.most_common(4))
    print(f"one image forward: {operations / 1e6:,.1f} MFLOP, {moved / 1e6:,.2f} MB ({shares})")
    for kind in options.kinds:
        forward, backward = _KINDS[kind]
        work = operations * (forward + BACKWARD_OPERATIONS * backward - (backward - 1)) * options.batch
        data = moved * (forward + BACKWARD_BYTES * backward) * options.batch
        seconds = _median_seconds(step_of(kind, options, device), device, options.steps)
        arithmetic, memory = work / flops, data / bandwidth
        print(
            f"{kind:13s} {seconds * 1000:7.1f} ms a step: arithmetic {arithmetic * 1000:6.1f} ms, memory "
            f"{memory * 1000:6.1f} ms, {seconds / max(arithmetic, memory):.1f} times the larger, "
            f"{seconds / (arithmetic + memory):.1f} times their sum"
        )


def count_forward(architecture: str, bits: int, size: int) -> tuple[float, Counter[str]]:
    """Operations of one image, and bytes by type of layer."""
    model = build_model(model_spec(architecture, bits, size)).eval()
    operations = [0.0]
    traffic: Counter[str] = Counter()

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x, y = (getattr(value, "value", value) for value in (inputs[0], output))
        if isinstance(module, nn.Conv2d | nn.Linear):
            operations[0] += 2.0 * y.numel() * module.weight[0].numel()
        traffic[type(module).__name__] += 4 * (x.numel() + y.numel())

    # Parts of a Brevitas layer do not count: a hook on its ReLU would keep ReLU and quantizer from running as one.
    layers = [module for module in model.modules() if hasattr(module, "act_quant")]
    parts = {part for layer in layers for part in layer.modules() if part is not layer}
    layers += [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.ReLU | nn.AdaptiveAvgPool2d)
        and module not in parts
    ]
    handles = [module.register_forward_hook(look) for module in layers]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return operations[0], traffic


def _product_rate(device: torch.device) -> float:
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    return 2.0 * side**3 / _median_seconds(lambda: a @ b, device, 5)


def _copy_rate(device: torch.device) -> float:
    a = torch.rand(64 * 1024 * 1024, device=device)
    b = torch.empty_like(a)
    return 2.0 * 4 * a.numel() / _median_seconds(lambda: b.copy_(a), device, 5)


def _median_seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    work()
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
