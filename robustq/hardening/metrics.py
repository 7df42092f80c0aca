"""Metrics of an epoch: running means, rows of metrics.jsonl, TensorBoard.

Sums over an epoch's batches, for its row in metrics.jsonl.

A run's metrics for TensorBoard, in the folder ``tensorboard`` beside metrics.jsonl; only on request.

An epoch's row of metrics.jsonl.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustq.errors import UsageError
from robustq.hardening.monitor import Inspection, Watched


class RunningMeans:
    """Sums of the loss, its terms and the right answers, kept on the device so that no batch waits for the host.

    Args:
        device: where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._device = device

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, y: Tensor) -> None:
        """Count one batch: scalar means ``loss`` and ``terms``, ``logits`` (B, K), labels ``y`` (B,)."""
        values = {"loss": loss.detach(), **terms}
        for name, value in values.items():
            self._add(name, value * len(y))
        self._add("train_accuracy", (logits.argmax(dim=1) == y).sum())
        self._count += len(y)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value

    def means(self) -> dict[str, float]:
        """Means over the images so far, by name."""
        return {name: value.item() / self._count for name, value in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums as they stand."""
        return {"count": self._count, "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self._count = int(state["count"])
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}


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


class TensorBoardLogger:
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


OF_THE_MACHINE = ("seconds", "images_per_second", "loading_share", "peak_memory_bytes")
"""Keys whose values belong to the machine and the moment; all others are the same whenever the run is."""


def epoch_row(
    epoch: int,
    means: Mapping[str, float],
    watched: Watched,
    inspection: Inspection,
    *,
    lr: float,
    seconds: float,
    training_seconds: float,
    loading_seconds: float,
    images: int,
    device: torch.device,
) -> dict[str, Any]:
    """Plain JSON types, one key a number.

    Args:
        epoch: counted from 1.
        means: the loss, its terms before weighting and ``train_accuracy``, over the epoch's batches as they came.
        watched, inspection: of the held-out images after the epoch, in eval mode.
        lr: learning rate of the last step.
        seconds: of the epoch, watching included.
        training_seconds: of its training steps, in all processes that took part.
        loading_seconds: of these, how long the next batch was waited for.
        images: training images.
        device: where.
    """
    return {
        "epoch": epoch,
        **means,
        "holdout_clean_accuracy": watched.clean,
        "holdout_pgd10_accuracy": watched.robust,
        **asdict(inspection),
        "lr": lr,
        "seconds": seconds,
        "images_per_second": images / max(training_seconds, 1e-9),
        "loading_share": loading_seconds / max(training_seconds, 1e-9),
        **peak_memory(device),
    }


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak of a GPU's memory anew; that of a process cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """``peak_memory_bytes``: the most that torch's tensors took on the GPU since it was last forgotten, or on a CPU the
    most that this process ever took; ``peak_memory_of`` says which: the device's name, or ``process``.
    """
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": str(device)}
    return {"peak_memory_bytes": process_peak(), "peak_memory_of": "process"}


def process_peak() -> int:
    """Most bytes of memory that this process has taken so far."""
    import resource

    # Kilobytes, but bytes on macOS: getrusage(2) of each.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
