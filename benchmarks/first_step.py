"""Time from `robustq harden` to its first training step, compared with `import torch`.

    python -m benchmarks.first_step [--architecture resnet20] [--bits 4] [--images 50000] [--rounds 5]

A round starts two fresh interpreters: one imports torch; the other hardens a random float network by ODG-Q on random
images in the sizes of CIFAR-10, prints three moments, and stops after the first step. The first round is a warm-up.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.output import make_parser, ratio

GOAL_SECONDS = 6.0
WARM_UP = 1
TEST_IMAGES = 10_000

PARTS = ("modules loaded", "first step begins", "first step has ended")

PROGRAM = """
import os, sys, time
from robustq.cli.program import main
from robustq.cli.process import prepare
prepare()
import robustq.workflow.train
from robustq.hardening.optimization import TrainStep
moments = [time.time()]
step = TrainStep.step
def timed(self, *inputs, **named):
    moments.append(time.time())
    step(self, *inputs, **named)
    moments.append(time.time())
    print(*moments, file=sys.__stdout__, flush=True)
    os._exit(0)
TrainStep.step = timed
sys.argv[0] = "robustq"
main()
"""


def main() -> None:
    """Measure and print the medians."""
    parser = make_parser(__doc__)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "float.pt", Path(folder) / "images.npz"
        _write(model, data, architecture=options.architecture, images=options.images)
        command = ["harden", str(model), "--bits", str(options.bits), "--data", str(data), "--device", "cpu"]
        torch_alone: list[float] = []
        parts: list[list[float]] = [[] for _ in PARTS]
        for round_number in range(-WARM_UP, options.rounds):
            started = time.time()
            subprocess.run([sys.executable, "-c", "import torch"], check=True, cwd=folder)
            ended = time.time()
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *command], check=True, cwd=folder, stdout=subprocess.PIPE, text=True
            )
            if round_number >= 0:
                torch_alone.append(ended - started)
                for seconds, moment in zip(parts, done.stdout.split()[-len(PARTS) :], strict=True):
                    seconds.append(float(moment) - ended)
    print(f"{'import torch':22}{statistics.median(torch_alone):6.2f} s")
    for name, seconds in zip(PARTS, parts, strict=True):
        spread = f"{statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"{name:22}{spread}, {ratio(seconds, torch_alone)} times import torch")
    begins = statistics.median(parts[1])
    print(f"goal for the first step: {GOAL_SECONDS:.0f} s, {'met' if begins <= GOAL_SECONDS else 'missed'}")


def _write(model_file: Path, data_file: Path, *, architecture: str, images: int) -> None:
    import numpy as np

    from benchmarks.training import model_spec
    from robustq.checkpoint import save_model
    from robustq.models.spec import build_model

    spec = model_spec(architecture, 32, 32)
    save_model(model_file, build_model(spec), spec)
    generator = np.random.default_rng(0)
    x_train, x_test = (
        generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (images, TEST_IMAGES)
    )
    y_train, y_test = (np.arange(count) % spec.classes for count in (images, TEST_IMAGES))
    np.savez_compressed(data_file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


if __name__ == "__main__":
    main()
