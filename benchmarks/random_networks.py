"""Do the files of networks that nobody drew give PyTorch's answers, or are they refused?

    python -m benchmarks.random_networks [--first 0] [--seeds 1000] [--format integer]

Each seed is a user network of :mod:`tests.export.random_nets`, with BatchNorm channels out of all bounds, exported and
proved as ``robustq export`` does. One line for each network that is not equal, and a count of all at the end; exits
with 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.export.random_nets import outcome


def main() -> None:
    """Draw, export and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--format", default="integer", choices=("qcdq", "integer", "packed"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.seeds):
            found = outcome(seed, options.format, Path(folder))
            counts[found.split(":")[0]] += 1
            if found != "equal":
                print(f"seed {seed}: {found}", flush=True)
    print(f"{options.format}, seeds {options.first} to {seed}: {dict(counts)}")
    sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
