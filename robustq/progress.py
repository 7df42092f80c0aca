"""Progress on stderr: notes, and one bar at a time with rate and time left.

Everything is off until the command line calls :func:`show`. Without a terminal only notes are printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from robustq.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_shown = False
_detailed = False
_drawn = False
_kept: str | None = None


def show(enabled: bool, *, details: bool = False) -> None:
    """Switch bars and notes, and separately details, on or off for this process."""
    global _shown, _detailed
    _shown, _detailed = enabled, details


def note(text: str) -> None:
    """Print one line; never part of a result."""
    if _shown and (_kept is None or text.startswith(_kept)):
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def only_notes(start: str) -> Iterator[None]:
    """Within the block, which runs a job inside a job, print only notes that begin with ``start``."""
    global _kept
    before, _kept = _kept, start
    try:
        yield
    finally:
        _kept = before


def detail(text: str) -> None:
    """Print one line with ``--verbose`` only."""
    if _detailed:
        print(printable(text), file=sys.stderr, flush=True)


class Bar:
    """A bar of ``total`` units; :meth:`advance` is cheap and may be called for every batch."""

    def __init__(self, progress: Progress | None, task: TaskID | None, unit: str) -> None:
        self._progress = progress
        self._task = task
        self._unit = unit
        self._done = 0.0
        self._text = ""
        self._updated = 0.0
        self._start = time.perf_counter()

    @property
    def rate(self) -> float:
        """Units a second since the bar began."""
        return self._done / max(time.perf_counter() - self._start, 1e-9)

    def advance(self, count: float, text: str | Callable[[], str] = "") -> None:
        """Count ``count`` more units and show ``text`` beside the bar.

        A function is called at most twice a second, and only if a bar is drawn: reading a loss makes a GPU wait.
        """
        self._done += count
        if self._progress is None or self._task is None:
            return
        now = time.perf_counter()
        if now - self._updated > 0.5:
            self._text, self._updated = text() if callable(text) else text, now
        shown = f"{self.rate:,.0f} {self._unit}/s  {self._text}".strip()
        self._progress.update(self._task, advance=count, text=shown)


@contextmanager
def bar(label: str, total: float, unit: str = "img") -> Iterator[Bar]:
    """Draw a bar while the block runs, unless another bar is being drawn."""
    global _drawn
    if not _shown or _drawn or not sys.stderr.isatty():
        yield Bar(None, None, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[text]}"),
    )
    _drawn = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield Bar(progress, progress.add_task(printable(label), total=total, text=""), unit)
    finally:
        _drawn = False
