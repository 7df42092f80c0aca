"""What the trainer asks of a training method: a loss for one batch, and a word on what a batch costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The outcome of one forward computation.

    Args:
        loss: scalar to minimise, with gradient.
        terms: its parts before weighting, detached, by name (for metrics.jsonl).
        logits: (B, K) of the images that the weights are trained on, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Method(Protocol):
    """A training method; it may keep state from batch to batch."""

    @property
    def passes(self) -> str:
        """Cost of one batch, for people: ``3 forward + 2 backward passes``."""

    @property
    def adversarial(self) -> bool:
        """Whether best.pt is chosen by robust accuracy on the held-out images (else by clean accuracy)."""

    def begin_epoch(self, epoch: int) -> None:
        """Told before the first batch of each epoch, counted from 0."""

    def training_step(self, x: Tensor, y: Tensor, places: Tensor) -> Step:
        """The loss of one batch; the trainer runs its backward pass and steps the optimiser.

        Args:
            x: (B, C, H, W) float32 in [0, 1]; a short last batch has fewer images.
            y: (B,) int64 labels.
            places: (B,) int64 positions of the images in the training split.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the method carries from batch to batch, random generators included: with the weights and the
        optimiser's state it must be all that the next batch depends on, or a resumed run would be another run.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave; in mid-epoch no :meth:`begin_epoch` follows."""
