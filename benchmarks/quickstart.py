"""The quickstart under several seeds, as the Markdown table of docs/results/quickstart.md.

    python -m benchmarks.quickstart [--seeds 0 1 2]

Every run is `robustq quickstart --json` in a process of its own, which gives wall time and peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.output import head, make_parser, percent, row

COLUMNS = ("clean", "fgsm", "pgd20", "margin_pgd40")


def main() -> None:
    """Run and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    head("seed", "model", "clean", "FGSM", "PGD-20", "margin-PGD-40", "worst case [95%]", "file")
    runs = []
    for seed in options.seeds:
        result, seconds = _run(seed)
        for model in result["rows"]:
            shares = [f"{100 * model[name]:.1f}" for name in COLUMNS]
            worst = percent(model["worst_case"], model["worst_case_interval"])
            row(seed, model["model"], *shares, worst, f"{model['size_bytes'] / 1000:.0f} kB")
        runs.append((seed, result, seconds))
    print()
    head("seed", "seconds", "other predictions of the file", "changed by folding", "integer, float layers")
    for seed, result, seconds in runs:
        recheck = result["steps"]["recheck"]
        other = ", ".join(f"{run} {found['different_top1']}" for run, found in recheck["parity"].items())
        drift = result["steps"]["export"]["integer"]["drift"]["different_top1"]
        layers = f"{len(recheck['integer_layers'])}, {len(recheck['float_layers'])}"
        row(seed, f"{seconds:.0f}", f"{other} of {result['test_images']}", drift, layers)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"\npeak memory of the largest run {peak:.2f} GiB; {os.cpu_count()} cores")


def _run(seed: int) -> tuple[dict[str, Any], float]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "robustq.cli", "quickstart", "--seed", str(seed), "--json"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout), time.perf_counter() - start


if __name__ == "__main__":
    main()
