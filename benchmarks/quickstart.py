"""The quickstart under several seeds, as the Markdown table of docs/results/quickstart.md.

    python -m benchmarks.quickstart [--seeds 0 1 2]

Every run is `robustq quickstart --json` in a process of its own; its wall time and peak memory are the process'.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

COLUMNS = ("clean", "fgsm", "pgd20", "margin_pgd40", "worst_case")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    print("| seed | model | clean | FGSM | PGD-20 | margin-PGD-40 | worst case [95%] | file |")
    print("|---|---|---|---|---|---|---|---|")
    runs = []
    for seed in options.seeds:
        result, seconds = _run(seed)
        for row in result["rows"]:
            shares = " | ".join(f"{100 * row[name]:.1f}" for name in COLUMNS)
            low, high = row["worst_case_interval"]
            size = f"{row['size_bytes'] / 1000:.0f} kB"
            print(f"| {seed} | {row['model']} | {shares} [{100 * low:.1f}, {100 * high:.1f}] | {size} |")
        runs.append((seed, result, seconds))
    print()
    for seed, result, seconds in runs:
        parity = result["steps"]["recheck"]["parity"]
        told = ", ".join(f"{run} {found['different_top1']}" for run, found in parity.items())
        drift = result["steps"]["export"]["integer"]["drift"]["different_top1"]
        layers = result["steps"]["recheck"]
        print(
            f"- seed {seed}: {seconds:.0f} s; of {result['test_images']} images the deployed file gives another class "
            f"than the folded PyTorch model to: {told}; folding itself changed {drift}; "
            f"{len(layers['integer_layers'])} integer layers, {len(layers['float_layers'])} float"
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"- peak memory of the largest run {peak:.2f} GiB; {os.cpu_count()} cores")


def _run(seed: int) -> tuple[dict[str, Any], float]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "robustq.cli", "quickstart", "--seed", str(seed), "--json"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout), time.perf_counter() - start


if __name__ == "__main__":
    main()
