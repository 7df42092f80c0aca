"""A run's metrics for TensorBoard, in the folder ``tensorboard`` beside metrics.jsonl; only on request."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustq.errors import UsageError

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Make sure that TensorBoard's writer is there, before a run counts on it.

    Raises:
        UsageError: the package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "tensorboard = true needs the package tensorboard, which is not installed: pip install tensorboard, or "
            "leave it out (metrics.jsonl has the same numbers)"
        )


class Board:
    """Event files that say what metrics.jsonl says.

    Event files only grow, and a process that dies may have written an epoch that resume.pt knows nothing of. So each
    process begins with new ones: it removes those of the run's earlier processes and writes all rows again.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._writer: Any = None
        self._written = 0

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows that are not there yet: every number under its key, at the epoch of its row.

        Args:
            rows: all of the run so far.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = SummaryWriter(str(self._folder))
        for row in rows[self._written :]:
            for key, value in row.items():
                if key != "epoch" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["epoch"])
        self._written = len(rows)
        self._writer.flush()

    def close(self) -> None:
        """Give the files back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
