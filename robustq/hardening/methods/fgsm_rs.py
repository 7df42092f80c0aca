"""FGSM-RS, "fast" adversarial training: FGSM from a random start (Wong et al. 2020, arXiv:2001.03994, Algorithm 3).

delta = U(-epsilon, epsilon); delta = clip(delta + 1.25 epsilon sign(grad CE(x + delta)), epsilon); train on x + delta.
The step is 10/255 at 8/255. The method can collapse (catastrophic overfitting, section 5 there); the monitor checks it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import pgd
from robustq.hardening.methods.method import AdversarialTraining
from robustq.hardening.methods.settings import MethodSettings, bn_mode, number


@dataclass(frozen=True, kw_only=True)
class FgsmRsSettings(MethodSettings):
    """The ``[fgsm-rs]`` table of a recipe.

    Args:
        step_scale: the step as a multiple of epsilon; 1.25 is the paper's 10/255 at 8/255 (its section 4).
        batch_norm: during attack generation (:data:`.settings.BATCH_NORM_MODES`); ``train`` as in the paper's code.
    """

    method = "fgsm-rs"

    step_scale: float = number(1.25, low=0, high=1000, above=True)
    batch_norm: str = bn_mode("train")


class FgsmRs(AdversarialTraining):
    """One attack step from a random point of the ball, then one training step.

    Deviation from the paper's Algorithm 3: x + delta_0 is clamped to [0, 1] as well (its code does so too).
    """

    settings: FgsmRsSettings

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """One projected step from a uniform point: PGD-1 with a long step."""
        # Two images differ by at most 1, so a longer step would be projected to the same image.
        step_size = min(self.settings.step_scale * self.epsilon, 1.0)
        return self.generate(pgd, x, y, step_size=step_size, steps=1)
