"""Training step by how long idle OpenMP threads spin before they sleep, alone and beside a busy process.

    python -m benchmarks.waiting_threads [--kind natural] [--rounds 5]

Every round starts one process of `benchmarks.training` per setting. Printed: the median step, and the ratio to threads
that sleep at once. `robustq.cli.process` sets GOMP_SPINCOUNT unless the user sets OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys

from benchmarks.output import make_parser, ratio

SETTINGS = {
    "sleep at once": {"GOMP_SPINCOUNT": "0"},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "as robustq sets it": {},
    "100,000 turns": {"GOMP_SPINCOUNT": "100000"},
    "spin for ever": {"OMP_WAIT_POLICY": "ACTIVE"},
}

OTHER_PROCESS = "while True: pass"


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--kind", default="natural", help="a kind of benchmarks.training")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for busy in (False, True):
        print("beside a busy process:" if busy else "alone:", flush=True)
        other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS]) if busy else None
        try:
            _compare(options.kind, options.rounds)
        finally:
            if other is not None:
                other.kill()


def _compare(kind: str, rounds: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, environment in SETTINGS.items():
            found[name].append(_milliseconds(kind, environment))
    asleep = found["sleep at once"]
    for name, values in found.items():
        print(f"  {name:20}{statistics.median(values):8.1f} ms a step, ratio {ratio(values, asleep)}", flush=True)


def _milliseconds(kind: str, environment: dict[str, str]) -> float:
    inherited = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "benchmarks.training", "--kinds", kind, "--rounds", "10", "--steps", "1"]
    done = subprocess.run(command, env={**inherited, **environment}, check=True, capture_output=True, text=True)
    found = re.search(rf"^{kind} +([\d.]+) ms a step", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return float(found[1])


if __name__ == "__main__":
    main()
