"""FGSM-RS, "fast" adversarial training: FGSM from a random start (Wong et al. 2020, arXiv:2001.03994, Algorithm 3).

delta = U(-epsilon, epsilon); delta = clip(delta + 1.25 epsilon sign(grad CE(x + delta)), epsilon); train on x + delta.
The step is 10/255 at 8/255. The method can collapse (catastrophic overfitting, section 5 there); the monitor checks it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import pgd
from robustq.hardening.methods.method import (
    AdversarialTraining,
    MethodEntry,
    attack_generation,
    batch_norm_errors,
    raise_errors,
)
from robustq.recipe.schema import number_errors


@dataclass(frozen=True, kw_only=True)
class FgsmRsSettings:
    """The ``[fgsm-rs]`` table of a recipe.

    Args:
        step_scale: the step as a multiple of epsilon; 1.25 is the paper's 10/255 at 8/255 (its section 4).
        batch_norm: during attack generation (:data:`.method.BATCH_NORM_MODES`); ``train`` as in the paper's code.
    """

    step_scale: float = 1.25
    batch_norm: str = "train"

    def __post_init__(self) -> None:
        raise_errors(
            number_errors("fgsm-rs.step_scale", self.step_scale, low=0, high=1000, above=True),
            batch_norm_errors("fgsm-rs.batch_norm", self.batch_norm),
        )


class FgsmRs(AdversarialTraining[FgsmRsSettings]):
    """One attack step from a random point of the ball, then one training step.

    Deviation from the paper's Algorithm 3: x + delta_0 is clamped to [0, 1] as well (its code does so too).
    """

    @property
    def passes(self) -> str:
        """One attack pass and the training pass."""
        return "2 forward + 2 backward passes"

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """One projected step from a uniform point: PGD-1 with a long step."""
        # Two images differ by at most 1, so a longer step would be projected to the same image.
        step_size = min(self.settings.step_scale * self.epsilon, 1.0)
        with attack_generation(self.model, self.settings.batch_norm):
            return pgd(self.model, x, y, epsilon=self.epsilon, step_size=step_size, steps=1, generator=self.generator)


METHOD = MethodEntry("fgsm-rs", FgsmRsSettings, FgsmRs)
