"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustq.hardening.methods.method import PLAIN_CROSS_ENTROPY, CrossEntropy, Stateless, Step, task_step


@dataclass(frozen=True)
class NaturalSettings:
    """The ``[natural]`` table of a recipe: it has no keys."""


class Natural(Stateless):
    """Minimises the mean cross-entropy of clean images; the baseline of every table.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        cross_entropy: the task loss.
    """

    passes = "1 forward + 1 backward pass"
    adversarial = False

    def __init__(self, model: nn.Module, *, cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY) -> None:
        self.model = model
        self.cross_entropy = cross_entropy

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """The clean images."""
        return x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """See :meth:`robustq.hardening.methods.method.Method.loss`."""
        return task_step(self.model, x_adv, y, cross_entropy=self.cross_entropy)
