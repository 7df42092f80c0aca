"""An epoch's row of metrics.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from robustq.hardening.inspection import Inspection
from robustq.hardening.monitor import Watched

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
