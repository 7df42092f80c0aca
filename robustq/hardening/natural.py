"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from robustq.hardening.method import Step


@dataclass(frozen=True)
class NaturalSettings:
    """The ``[natural]`` table of a recipe: it has no keys."""


class Natural:
    """Minimises the mean cross-entropy of clean images; the baseline of every table.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
    """

    passes = "1 forward + 1 backward pass"
    adversarial = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes between epochs."""

    def training_step(self, x: Tensor, y: Tensor, places: Tensor) -> Step:
        """See :meth:`robustq.hardening.method.Method.training_step`."""
        logits = self.model(x)
        loss = functional.cross_entropy(logits, y)
        return Step(loss, {"cross_entropy": loss.detach()}, logits.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""
