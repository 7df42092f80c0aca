"""Time of attack passes, eager and with `robustq attack --compile`, in turns in one run.

    python -m benchmarks.attack_passes MODEL [--batch 256 64] [--rounds 9] [--steps 3] [--without-integers]
    python -m benchmarks.attack_passes MODEL --whole [--suite standard] [--images 500]

MODEL is a model file or an export folder, whose folded network is then the gradient model. The first form times the
gradient under each backward rule, and the forward pass, on test images. Ratios are medians over rounds of the ratio
within one round. `first` is the time of the first pass, with compilation; `other signs` the share of the gradient's
non-zero signs that differ from eager. With `--without-integers` another column gives the time of compiled passes
without integer convolutions, divided by that with them. The second form runs a suite both ways, without other networks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from robustq.cli.process import prepare

prepare()  # before torch is loaded, as in the program

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.output import head, make_parser, ratio, row  # noqa: E402
from robustq import progress  # noqa: E402
from robustq.attacks.base import Model, input_gradient  # noqa: E402
from robustq.data import to_float  # noqa: E402
from robustq.workflow.attack import attack_model  # noqa: E402
from robustq.workflow.open_model import open_attackable  # noqa: E402
from robustq.workflow.prepared_target import prepared_target  # noqa: E402
from robustq.workflow.setup import data_for, pick_device  # noqa: E402

Pass = Callable[[Model, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", help="default: as the model says")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--without-integers", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--suite", default="standard", help="with --whole")
    parser.add_argument("--images", type=int, default=500, help="with --whole")
    options = parser.parse_args()
    (_whole if options.whole else _passes)(options)


def _passes(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    opened = open_attackable(options.model, device=device)
    pixels, labels = data_for(opened.spec, options.data, opened.checkpoint).test.take(max(options.batch))
    print(f"{opened.spec.label}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    x, y, target = to_float(pixels.to(device)), labels.to(device), opened.target()
    with ExitStack() as stack:
        # Within it the weights of the eager network are quantized once too, as without --compile.
        fast = [stack.enter_context(prepared_target(target, opened.gradient_model, pixels, compiled=True))]
        if options.without_integers:
            other = open_attackable(options.model, device=device)
            with patch("robustq.models.quant.integer_convolution.is_available", return_value=False):
                floats = prepared_target(other.target(), other.gradient_model, pixels, compiled=True)
                fast.append(stack.enter_context(floats))
        ways: dict[str, tuple[Pass, list[Model]]] = {
            f"gradient, {rule}": (_gradient, [eager, *(one.gradient_models[rule] for one in fast)])
            for rule, eager in target.gradient_models.items()
        } | {"forward": (_forward, [target.gradient_model, *(one.gradient_model for one in fast)])}
        columns = ["without integers"] if options.without_integers else []
        head("pass", "images", "eager", "compiled", "ratio", "first", "other signs", *columns)
        for name, (run, models) in ways.items():
            first, apart = "", ""
            for count in options.batch:
                images = x[:count].clone()
                expected = run(models[0], images, y[:count])
                start = time.perf_counter()
                found = run(models[1], images, y[:count])
                if not first:
                    first = f"{time.perf_counter() - start:.0f} s"
                    differs = (found.sign() != expected.sign())[expected != 0]
                    apart = f"{100 * float(differs.float().mean()):.3f}%" if run is _gradient else ""
                seconds = _seconds(run, models, images, y[:count], options)
                times = [f"{1000 * statistics.median(one):.1f} ms" for one in seconds[:2]]
                more = [ratio(seconds[2], seconds[1])] if options.without_integers else []
                row(name, count, *times, ratio(seconds[1], seconds[0]), first, apart, *more)


def _seconds(run: Pass, models: list[Model], x: Tensor, y: Tensor, options: argparse.Namespace) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in models]
    for number in range(options.rounds + 1):
        for model, kept in zip(models, found, strict=True):
            start = time.perf_counter()
            for _ in range(options.steps):
                run(model, x, y)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            if number:  # the first round warms up
                kept.append((time.perf_counter() - start) / options.steps)
    return found


def _gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return input_gradient(model, x, lambda logits: functional.cross_entropy(logits, y, reduction="none")).gradient


@torch.no_grad()
def _forward(model: Model, x: Tensor, _: Tensor) -> Tensor:
    return model(x)


def _whole(options: argparse.Namespace) -> None:
    progress.show(False)
    settings = {"suite": options.suite, "images": options.images, "data": options.data, "device": options.device}
    seconds = []
    for compiled in (False, True):
        found = attack_model(options.model, train_surrogates=False, compiled=compiled, **settings)
        seconds.append(found["seconds"])
        print(
            f"{'compiled' if compiled else 'eager':12s}{found['seconds']:8.1f} s, "
            f"{found['gradient_steps']:,} gradient steps, {found['queries']:,} queries, "
            f"robust accuracy {found['robust_accuracy']:.3f}",
            flush=True,
        )
    print(f"compiled / eager = {seconds[1] / seconds[0]:.2f}")


if __name__ == "__main__":
    main()
