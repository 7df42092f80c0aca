"""What the passes of attacks cost, as `robustq attack` makes them without and with `--compile`, interleaved in one run.

    python -m benchmarks.attack_passes MODEL [--batch 256 64] [--rounds 9] [--steps 3]

MODEL is a model file or an export folder, whose folded network is then the source. Timed are a gradient under each
backward rule, and answers without gradient, on test images; each round times the two ways one after the other, and a
ratio is the median over rounds of the ratio within one. Printed beside it: how long the first pass of its kind took,
which compiles it, and the share of the gradient's signs that are not those of the network as it is written, among
pixels where that one is not zero.

`--whole` runs the suite both ways instead, one after the other, on `--images` images without other networks: seconds,
gradient steps and images left.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from robustq.cli.process import prepare

prepare()  # before torch is loaded, as in the program

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from robustq import progress  # noqa: E402
from robustq.attacks.base import Model, input_gradient  # noqa: E402
from robustq.data import to_float  # noqa: E402
from robustq.workflow.attack import attack_model, prepared_target  # noqa: E402
from robustq.workflow.open_model import OpenedModel, open_attackable  # noqa: E402
from robustq.workflow.setup import data_for, pick_device  # noqa: E402

Pass = Callable[[Model, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", help="over what the model says")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--suite", default="standard", help="with --whole")
    parser.add_argument("--images", type=int, default=500, help="with --whole")
    options = parser.parse_args()
    if options.whole:
        _whole(options)
        return
    device = pick_device(options.device)
    opened = open_attackable(options.model, device=device)
    pixels, labels = data_for(opened.spec, options.data, opened.checkpoint).test.take(max(options.batch))
    print(f"{opened.spec.label}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    _passes(opened, pixels, labels.to(device), options)


def _passes(opened: OpenedModel, pixels: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    target = opened.target()
    x = to_float(pixels.to(y.device))
    # The network as it is written has its weights quantized once in there too, as without --compile.
    with prepared_target(target, opened.gradient_model, pixels, compiled=True) as fast:
        ways = {
            f"gradient, {rule}": (_gradient, target.sources[rule], fast.sources[rule]) for rule in target.sources
        } | {"answers": (_answers, target.source, fast.source)}
        print("| pass | images | as written | compiled | ratio | first | other signs |")
        print("|---|---|---|---|---|---|---|")
        for name, (run, written, compiled) in ways.items():
            first, apart = "", ""
            for count in options.batch:
                images = x[:count].clone()
                expected = run(written, images, y[:count])
                start = time.perf_counter()
                found = run(compiled, images, y[:count])
                if not first:
                    first = f"{time.perf_counter() - start:.0f} s"
                    other = (found.sign() != expected.sign())[expected != 0]
                    apart = f"{100 * float(other.float().mean()):.3f}%" if run is _gradient else ""
                seconds = _seconds(run, (written, compiled), images, y[:count], options)
                ratios = [b / a for a, b in zip(*seconds, strict=True)]
                times = " | ".join(f"{1000 * statistics.median(one):.1f} ms" for one in seconds)
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"| {name} | {count} | {times} | {spread} | {first} | {apart} |", flush=True)


def _seconds(
    run: Pass, models: tuple[Model, Model], x: Tensor, y: Tensor, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = ([], [])
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
def _answers(model: Model, x: Tensor, _: Tensor) -> Tensor:
    return model(x)


def _whole(options: argparse.Namespace) -> None:
    progress.show(False)
    seconds = []
    for compiled in (False, True):
        found = attack_model(
            options.model,
            suite=options.suite,
            images=options.images,
            data=options.data,
            train_surrogates=False,
            compiled=compiled,
            device=options.device,
        )
        seconds.append(found["seconds"])
        print(
            f"{'compiled' if compiled else 'as written':12s}{found['seconds']:8.1f} s, "
            f"{found['gradient_steps']:,} gradient steps, {found['queries']:,} queries, "
            f"robust accuracy {found['robust_accuracy']:.3f}",
            flush=True,
        )
    print(f"compiled / as written = {seconds[1] / seconds[0]:.2f}")


if __name__ == "__main__":
    main()
