"""Catastrophic overfitting noticed: robust accuracy that falls and stays down while the training loss looks fine.

Single-step training can lose all robustness against PGD within one epoch (arXiv:2001.03994, section 5.3), and hardly
ever finds it again; more epochs then only cost time. A drop counts as a collapse when the accuracy

- is below half of the best so far: training that overfits slowly, or an epoch at a high learning rate, loses points,
  not half; and
- the best was more than any constant answer reaches, beyond chance: a network in its first epochs may give one class to
  all images, which no attack changes, and looks less robust as soon as it learns; and
- lies below it beyond chance: the upper end of its 95% Wilson interval is under the lower end of the best one's, so
  that a few held-out images cannot stop a run; and
- does so in :data:`EPOCHS` epochs running: a single bad one, from which training recovers by itself, shows up wherever
  BatchNorm's running statistics lag behind a large step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robustq.evaluation.accuracy import wilson_interval

EPOCHS = 2
"""Epochs in a row that have to be down."""


@dataclass(frozen=True)
class Collapse:
    """A collapse of robust accuracy.

    Args:
        epoch: the epoch after which it was certain, counted from 1.
        robust: PGD-10 accuracy on the held-out images after it, in [0, 1].
        best_epoch, best: of the highest one before.
        planned: epochs of the recipe.
    """

    epoch: int
    robust: float
    best_epoch: int
    best: float
    planned: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """One line: what happened, where the good weights are, what to do."""
        return (
            f"robust accuracy collapsed (catastrophic overfitting): PGD-10 {self.robust:.1%} on held-out images in "
            f"epoch {self.epoch}, {self.best:.1%} in epoch {self.best_epoch}; stopped after {self.epoch} of "
            f"{self.planned} epochs, best.pt is of epoch {self.best_epoch}; lower lr or epsilon, take another method, "
            "or train on regardless in a new run with --set stop_on_collapse=false"
        )


def find_collapse(robust: Sequence[float | None], *, images: int, chance: float, planned: int) -> Collapse | None:
    """Whether the last epoch of ``robust`` makes a collapse certain.

    Args:
        robust: PGD-10 accuracy after each epoch so far, in [0, 1]; None where it is not watched.
        images: that it was counted on.
        chance: share of the most frequent class among them, in [0, 1].
        planned: epochs of the recipe.
    """
    counted = [accuracy for accuracy in robust if accuracy is not None]
    if len(counted) != len(robust) or len(counted) <= EPOCHS:
        return None
    before, recent = counted[:-EPOCHS], counted[-EPOCHS:]
    best = max(before)
    if _interval(best, images)[0] <= chance or not all(_is_down(accuracy, best, images) for accuracy in recent):
        return None
    best_epoch = len(before) - before[::-1].index(best)  # of equal ones the last, as best.pt's
    return Collapse(len(counted), recent[-1], best_epoch, best, planned)


def _is_down(accuracy: float, best: float, images: int) -> bool:
    return accuracy < best / 2 and _interval(accuracy, images)[1] < _interval(best, images)[0]


def _interval(accuracy: float, images: int) -> tuple[float, float]:
    return wilson_interval(round(accuracy * images), images)
