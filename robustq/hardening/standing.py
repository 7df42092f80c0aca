"""How far a run has come, and what keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, Self

from torch import Tensor, nn

from robustq.hardening.monitor import Watched
from robustq.hardening.weights import taken_out


@dataclass
class Standing:
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
            self.best_epoch, self.best, self.best_weights = self.epoch, watched, taken_out(model)
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


class Keeper(Protocol):
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
