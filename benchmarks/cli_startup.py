"""How long `robustq --help` takes beside a bare Typer program's `--help`; the goal is at most 1.3 times.

Run from the repository: `python -m benchmarks.cli_startup --runs 30`. Both programs run in fresh interpreters, one
after the other in pairs whose order alternates, so that a busy moment of the machine meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

# What an installed console script does.
SCRIPT = "import sys\nfrom {module} import main\nsys.exit(main())\n"


def seconds(script: Path) -> float:
    """Return the wall time of one `--help` in a fresh interpreter, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(folder: Path, *, runs: int) -> tuple[list[float], list[float]]:
    """Return the times of the bare program and of robustq, `runs` of each, in seconds."""
    (folder / "bare_program.py").write_text(BARE, encoding="utf-8")
    scripts = []
    for module in ("bare_program", "robustq.cli"):
        script = folder / f"run_{module.replace('.', '_')}.py"
        script.write_text(SCRIPT.format(module=module), encoding="utf-8")
        scripts.append(script)
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(-WARM_UP, runs):
        for which in (0, 1) if run % 2 else (1, 0):
            elapsed = seconds(scripts[which])
            if run >= 0:
                times[which].append(elapsed)
    return times


def main() -> None:
    """Measure and print medians, quartiles and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=30, help="pairs of runs that count (default 30)")
    runs = parser.parse_args().runs
    if runs < 2:
        parser.error(f"--runs is {runs}; at least 2 are needed for quartiles")
    with tempfile.TemporaryDirectory() as folder:
        bare, ours = measure(Path(folder), runs=runs)
    for name, times in (("bare Typer --help", bare), ("robustq --help", ours)):
        low, median, high = statistics.quantiles(times, n=4)
        print(f"{name:18}  median {median * 1000:6.1f} ms  quartiles {low * 1000:.1f} to {high * 1000:.1f}  n {runs}")
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"ratio of medians    {ratio:.2f}  (goal at most {GOAL}: {'met' if ratio <= GOAL else 'missed'})")


if __name__ == "__main__":
    main()
