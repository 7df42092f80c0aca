"""Metrics of an epoch: running means, peak memory, TensorBoard."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustq.errors import UsageError

FOLDER = "tensorboard"

MACHINE_KEYS = ("seconds", "images_per_second", "loading_share", "peak_memory_bytes")
"""Keys of a row that depend on the machine; all others are the same in a repeated run."""


class RunningMeans:
    """Sums of the loss, its terms and the correct answers, kept on the device of the batches."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._device = device

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, y: Tensor) -> None:
        """Add one batch: scalar means ``loss`` and ``terms``, ``logits`` (B, K), labels ``y`` (B,)."""
        sums = {name: value * len(y) for name, value in {"loss": loss.detach(), **terms}.items()}
        sums["train_accuracy"] = (logits.argmax(dim=1) == y).sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._count += len(y)

    def means(self) -> dict[str, float]:
        """Means over the images so far, by name."""
        return {name: value.item() / self._count for name, value in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"count": self._count, "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._count = int(state["count"])
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}


def check_tensorboard() -> None:
    """UsageError if TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "tensorboard = true needs the package tensorboard, which is not installed: pip install tensorboard, or "
            "leave it out (metrics.jsonl has the same numbers)"
        )


class TensorBoardLogger:
    """Writes the rows of metrics.jsonl as TensorBoard's event files.

    Event files can only grow, and a process that was killed may have written an epoch that resume.pt does not have. So
    each process removes the files of earlier ones in the run folder and writes all rows again.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._writer: Any = None
        self._written = 0

    def update(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the new ones of ``rows`` (all of the run so far): every number under its key, at its epoch."""
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
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of a GPU; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """``peak_memory_bytes``: on a GPU the peak of torch's tensors since the last reset, on a CPU the peak of this
    process; ``peak_memory_of``: the device's name, or ``process``.
    """
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": str(device)}
    return {"peak_memory_bytes": process_peak_memory(), "peak_memory_of": "process"}


def process_peak_memory() -> int:
    """Peak memory of this process, in bytes."""
    import resource

    # getrusage(2): kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
