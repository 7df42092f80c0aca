"""Adversarial training with K-step PGD (Madry et al. 2018, arXiv:1706.06083), and with BIM.

The weights are trained on what the attack of that name makes of each batch: min over the weights of the cross-entropy
of x_adv, x_adv = PGD-K(x). Without its random start PGD is BIM (Kurakin et al. 2017, arXiv:1611.01236). The ODG-Q
paper's tables have 5-PGD, 7-PGD and 5-BIM.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import pgd
from robustq.errors import RecipeError
from robustq.hardening.methods.method import (
    AUTO,
    AdversarialTraining,
    Step,
    crafting,
    length_errors,
    mode_errors,
    step_length,
    task_step,
)
from robustq.recipe.schema import number_errors


@dataclass(frozen=True, kw_only=True)
class PgdSettings:
    """The ``[pgd]`` table of a recipe.

    Args:
        steps: K; 7 in arXiv:1706.06083 for CIFAR-10.
        step_size: ``auto`` (see :func:`.crafting.step_length`), or a length such as ``"4/255"``. The
            ODG-Q paper does not give the step of its training attack; the one of its tables' attacks is 4/255.
        random_start: from a uniform point of the ball (PGD) or from the image itself (BIM).
        batch_norm: of the crafting passes, see :data:`.crafting.MODES`.
    """

    steps: int = 7
    step_size: str | float = AUTO
    random_start: bool = True
    batch_norm: str = "eval"

    def __post_init__(self) -> None:
        faults = number_errors("pgd.steps", self.steps, low=1, high=1000, integer=True)
        faults += length_errors("pgd.step_size", self.step_size, words=(AUTO,))
        faults += mode_errors("pgd.batch_norm", self.batch_norm)
        if faults:
            raise RecipeError("; ".join(faults))


class Pgd(AdversarialTraining[PgdSettings]):
    """K crafting steps, then one step of training on what they made.

    The attack ascends plain cross-entropy, whatever label smoothing the weights are trained with.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the ``[pgd]`` table.
        epsilon: radius of the threat model, in [0, 1].
        generator: CPU generator of the random starts.
        cross_entropy: the task loss.
    """

    @property
    def passes(self) -> str:
        """Cost of a batch."""
        count = int(self.settings.steps) + 1
        return f"{count} forward + {count} backward passes"

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """PGD-K inside the ball and inside [0, 1]."""
        steps = int(self.settings.steps)
        with crafting(self.model, self.settings.batch_norm):
            return pgd(
                self.model,
                x,
                y,
                epsilon=self.epsilon,
                step_size=step_length(self.settings.step_size, epsilon=self.epsilon, steps=steps),
                steps=steps,
                random_start=self.settings.random_start,
                generator=self.generator,
            )

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Cross-entropy of x_adv."""
        return task_step(self.model, x_adv, y, cross_entropy=self.cross_entropy)
