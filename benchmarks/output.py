"""Options and output that the benchmarks share. It does not load torch, which some benchmarks set up first."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def head(*columns: str) -> None:
    """Print the head of a Markdown table."""
    row(*columns)
    print("|---" * len(columns) + "|", flush=True)


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def percent(share: float, interval: Sequence[float]) -> str:
    """``61.6 [56.4, 66.4]`` of fractions."""
    return f"{100 * share:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median, least and largest ratio of the times of equal rounds: ``0.97 (0.91 to 1.01)``."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
