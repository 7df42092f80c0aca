"""The measurements of a GPU, in the order of their worth: each one command of at most 8 minutes.

    python -m benchmarks.gpu.rows smoke                         all tests that are marked gpu
    python -m benchmarks.gpu.rows epoch                         4-bit ODG-Q at batch 512: eager, compiled, CUDA graphs
    python -m benchmarks.gpu.rows run --data DATA [--out RUNS]  a float network, then the whole ODG-Q run
    python -m benchmarks.gpu.rows photographs                   ResNet-18 at 224 x 224, images per second
    python -m benchmarks.gpu.rows standard MODEL                suite `standard` on 10,000 images

`--tiny` with `--device cpu` runs the same commands in a minute or so, at sizes that show nothing but that they work.
The checkpoints that `run` writes can be exported on another machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.output import make_parser

LIMIT = 480.0
"""Seconds of a row."""


def main() -> None:
    """Run one row; its exit status is that of the command that failed."""
    parser = make_parser(__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("model", nargs="?", type=Path, help="of standard")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data", help="of run; default: as the recipe says")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="of run")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + LIMIT
    for command in ROWS[options.row](options):
        print("$", *command, flush=True)
        left = end - time.monotonic()
        try:
            subprocess.run([sys.executable, *command], check=True, timeout=left)
        except subprocess.TimeoutExpired:
            sys.exit(f"{options.row} took more than {LIMIT:.0f} s; what it has saved remains")
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
    print(f"{options.row}: {LIMIT - (end - time.monotonic()):.0f} s")


def _smoke(options: argparse.Namespace) -> list[list[str]]:
    return [["-m", "pytest", "-q", "-m", "gpu", *(["--collect-only"] if options.tiny else [])]]


def _epoch(options: argparse.Namespace) -> list[list[str]]:
    sizes = ["--batch", "16", "--images", "16", "--kinds", "eager"] if options.tiny else ["--batch", "512"]
    return [["-m", "benchmarks.gpu.epoch", "--device", options.device, *sizes]]


def _run(options: argparse.Namespace) -> list[list[str]]:
    if options.tiny:
        recipes, sizes = ("digits/resnet8-float-natural", "digits/resnet8-w4a4-odgq"), ["--set", "epochs=1"]
    else:
        # The float network is only the start: 30 epochs leave the time to the hardening.
        recipes, sizes = ("cifar10/resnet20-float-natural", "cifar10/resnet20-w4a4-odgq"), ["--set", "batch_size=512"]
    common = ["--device", options.device, *(["--data", options.data] if options.data else [])]
    first, second = options.out / "float", options.out / "odgq"
    program = ["-m", "robustq.cli"]
    short = [] if options.tiny else ["--set", "epochs=30"]
    return [
        [*program, "train", recipes[0], *common, *sizes, *short, "--out", str(first)],
        [*program, "harden", str(first / "best.pt"), "--recipe", recipes[1], *common, *sizes, "--out", str(second)],
    ]


def _photographs(options: argparse.Namespace) -> list[list[str]]:
    command = ["-m", "benchmarks.training", "--device", options.device]
    if options.tiny:
        once = ["--warm-up", "1", "--rounds", "1", "--steps", "1"]
        return [[*command, "--size", "32", "--batch", "4", *once, "--kinds", "odgq"]]
    kinds = ["plain", "natural", "odgq", "compiled-odgq", "graphs-odgq"]
    return [[*command, "--architecture", "resnet18", "--size", "224", "--batch", "256", "--kinds", *kinds]]


def _standard(options: argparse.Namespace) -> list[list[str]]:
    if options.model is None:
        sys.exit("standard needs a model file: python -m benchmarks.gpu.rows standard MODEL")
    images = "20" if options.tiny else "10000"
    suite = "recheck" if options.tiny else "standard"
    command = ["-m", "robustq.cli", "attack", str(options.model), "--suite", suite, "--images", images]
    return [[*command, "--device", options.device]]


ROWS = {"smoke": _smoke, "epoch": _epoch, "run": _run, "photographs": _photographs, "standard": _standard}

if __name__ == "__main__":
    main()
