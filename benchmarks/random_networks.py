"""Parity of random custom networks with their exported files.

    python -m benchmarks.random_networks [--first 0] [--seeds 1000] [--format integer]

Each seed gives a network of :mod:`tests.export.random_nets` with extreme BatchNorm channels, exported and checked as
``robustq export`` does. Prints a line for each network that is refused or differs, and the counts; exits with 1 after a
wrong prediction.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from benchmarks.output import make_parser
from tests.export.random_nets import outcome


def main() -> None:
    """Draw, export and print."""
    parser = make_parser(__doc__)
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
