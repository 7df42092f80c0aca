"""Time of `robustq --help` against `--help` of a bare Typer program; the goal is at most 1.3 times.

    python -m benchmarks.cli_startup [--runs 30]

Both run in fresh interpreters, in pairs whose order alternates.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.output import make_parser, ratio

GOAL = 1.3
WARM_UP = 3  # the first runs read files from disk and write bytecode

BARE = '''
import typer

app = typer.Typer(help="A bare program.")


@app.command()
def first(name: str = "x") -> None:
    """Do the first thing."""


@app.command()
def second(name: str = "x") -> None:
    """Do the second thing."""


def main() -> None:
    app()
'''


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=30, help="pairs of runs after the warm-up")
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {"bare_program": [], "robustq.cli": []}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bare_program.py").write_text(BARE, encoding="utf-8")
        for run in range(-WARM_UP, runs):
            for module in reversed(times) if run % 2 else times:
                seconds = _help_seconds(module, folder)
                if run >= 0:
                    times[module].append(seconds)
    for module, found in times.items():
        print(f"{module:14}{statistics.median(found) * 1000:7.1f} ms, median of {runs}")
    met = statistics.median(times["robustq.cli"]) <= GOAL * statistics.median(times["bare_program"])
    print(f"ratio {ratio(times['robustq.cli'], times['bare_program'])}, goal {GOAL}: {'met' if met else 'missed'}")


def _help_seconds(module: str, folder: str) -> float:
    code = f"import sys; from {module} import main; sys.exit(main())"  # as an installed console script
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
