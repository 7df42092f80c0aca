"""Numbers as a terminal shows them, each with its unit."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float | None) -> str:
    """``37.1%``; a dash where nothing was measured."""
    return "-" if share is None else f"{share:.1%}"


def bounded(share: float, interval: Sequence[float]) -> str:
    """``37.1% [34.2, 40.1]``: a share and its 95% interval."""
    return f"{share:.1%} [{interval[0] * 100:.1f}, {interval[1] * 100:.1f}]"


def scientific(value: float | None) -> str:
    """``4e-08``; ``NaN`` where nothing could be computed."""
    return "NaN" if value is None else f"{value:.0e}"


def size(count: int) -> str:
    """``187 kB``, ``12.3 MB``, ``1.1 GB``."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 10_000_000 else f"{count / 1000:,.0f} kB"


def duration(seconds: float) -> str:
    """``40 s``, ``6 min``, ``3.5 hours``, ``2.1 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"
