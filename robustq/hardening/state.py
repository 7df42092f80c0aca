"""The state of a training run: how far it is, its weights, and requests to stop.

A network's weights, taken out and put back without its quantizers noticing.

Ctrl-C and SIGTERM as a request: the batch is finished and the state saved; a second one stops at once.

How far a run has come, and what keeps it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import asdict, dataclass, field, fields
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from robustq.hardening.monitor import Watched
from robustq.progress import note


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into the very tensors of ``model``.

    ``model.load_state_dict`` will not do for a network in training: Brevitas then makes its quantizers anew, learned
    thresholds included (https://github.com/Xilinx/brevitas, ``REINIT_ON_STATE_DICT_LOAD``), and the optimiser would go
    on with the old ones, which nothing uses any more.

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


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """``with StopRequest() as stop:`` turns the first signal into ``stop.requested`` and the second into
    KeyboardInterrupt.

    Only the main thread of a process can take signals: in any other one nothing changes, and nothing is ever requested.
    A signal that is ignored (``nohup``, a shell's background job) stays ignored.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: the request is not for it to answer
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A signal may come while this very thread writes to stderr, which Python refuses to do twice at a time.
        with contextlib.suppress(RuntimeError):
            note("stopping after this batch, then saving; once more stops at once")


@dataclass
class TrainState:
    """How far a run has come.

    Args:
        epoch: epochs that have ended.
        step: batches of the next one that are done.
        rows: one row of metrics per ended epoch.
        best_epoch: counted from 1; 0 before the first one has ended.
        best: its accuracies.
        best_weights: its state dict, on the CPU.
        seconds: training time of all ended epochs.
        epoch_seconds: of the batches since.
        loading_seconds: of these, how long the next batch was waited for.
    """

    epoch: int = 0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: Watched | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    loading_seconds: float = 0.0

    def end_epoch(self, row: dict[str, Any], watched: Watched, model: nn.Module) -> bool:
        """Write down what an epoch gave, and keep its weights where they are the best so far; of equals the later.

        Args:
            row: its metrics.
            watched: its accuracies.
            model: with the weights that were watched.

        Returns:
            Whether they are the best so far.
        """
        self.epoch, self.step = self.epoch + 1, 0
        self.seconds += self.epoch_seconds
        self.epoch_seconds = self.loading_seconds = 0.0
        self.rows.append(row)
        is_best = self.best is None or watched.rank >= self.best.rank
        if is_best:
            self.best_epoch, self.best, self.best_weights = self.epoch, watched, snapshot(model)
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, "best": None if self.best is None else asdict(self.best)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What :meth:`to_dict` gave; lists and dicts are copied."""
        best = values["best"]
        return cls(
            **{
                **values,
                "rows": list(values["rows"]),
                "best_weights": dict(values["best_weights"]),
                "best": None if best is None else Watched(**best),
            }
        )


class Checkpointer(Protocol):
    """Where the state of a run is kept."""

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        """Keep ``state`` (plain containers, numbers and tensors, which must be copied or written out before returning).

        Args:
            state: what :meth:`Training.state_dict` gives.
            epoch_ended: whether it stands between two epochs, so that the weights were judged.
            is_best: whether that epoch is the best so far.
        """

    def load(self) -> dict[str, Any]:
        """The state that was saved last."""
