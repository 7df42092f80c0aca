"""State of a training run: progress and best weights, snapshots of weights, and stopping by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import asdict, dataclass, field, fields
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from robustq.hardening.monitor import HoldoutAccuracy
from robustq.progress import note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into the existing tensors of ``model``.

    ``model.load_state_dict`` is no alternative during training: Brevitas then rebuilds its quantizers with their
    learned thresholds (https://github.com/Xilinx/brevitas, ``REINIT_ON_STATE_DICT_LOAD``), and the optimizer would
    update the old ones.

    Raises:
        KeyError, ValueError: names or shapes differ.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        raise KeyError(f"weights differ in {sorted(own.keys() ^ weights.keys())[0]}")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
        value.copy_(weights[name])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights and running statistics of ``model``, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


class StopRequest:
    """``with StopRequest() as stop:`` turns the first SIGINT or SIGTERM into ``stop.requested`` and the second into
    KeyboardInterrupt.

    Only the main thread can take signals: in other threads nothing is ever requested. A signal that is ignored
    (``nohup``, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # The signal may interrupt a write to stderr, and Python refuses a nested one.
        with contextlib.suppress(RuntimeError):
            note("stopping after this batch, then saving; once more stops at once")


@dataclass
class TrainState:
    """Progress of a run.

    Args:
        epoch: finished epochs.
        step: finished batches of the next epoch.
        rows: one row of metrics for each finished epoch.
        best_epoch: counted from 1; 0 before the first one has ended.
        best: its accuracy.
        best_weights: its state dict, on the CPU.
        seconds: training time of all finished epochs.
        epoch_seconds: training time of the current epoch.
        loading_seconds: time in the current epoch spent waiting for the next batch.
    """

    epoch: int = 0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: HoldoutAccuracy | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    loading_seconds: float = 0.0

    def end_epoch(self, row: dict[str, Any], accuracy: HoldoutAccuracy, model: nn.Module) -> bool:
        """Add the metrics ``row`` of an epoch; keep the weights of ``model`` if ``accuracy`` is the best so far.

        Returns:
            Whether it is the best; of equal epochs the later one is.
        """
        self.epoch, self.step = self.epoch + 1, 0
        self.seconds += self.epoch_seconds
        self.epoch_seconds = self.loading_seconds = 0.0
        self.rows.append(row)
        is_best = self.best is None or accuracy.rank >= self.best.rank
        if is_best:
            self.best_epoch, self.best, self.best_weights = self.epoch, accuracy, snapshot(model)
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, "best": None if self.best is None else asdict(self.best)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; lists and dicts are copied."""
        best = values["best"]
        copies = {"rows": list(values["rows"]), "best_weights": dict(values["best_weights"])}
        return cls(**{**values, **copies, "best": None if best is None else HoldoutAccuracy(**best)})


class Checkpointer(Protocol):
    """Saves the state of a run."""

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        """Save a state: plain containers, numbers and tensors, to be copied or written before returning.

        Args:
            state: of :meth:`Training.state_dict`.
            epoch_ended: between two epochs, so that the weights have been evaluated.
            is_best: that epoch is the best so far.
        """

    def load(self) -> dict[str, Any]:
        """The last saved state."""
