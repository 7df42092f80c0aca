"""FGSM-RS, "fast" adversarial training: FGSM from a random start (Wong et al. 2020, arXiv:2001.03994, Algorithm 3).

delta = U(-epsilon, epsilon); delta = clip(delta + 1.25 epsilon sign(grad CE(x + delta)), epsilon); train on x + delta.
The step is 10/255 at 8/255. It can collapse (catastrophic overfitting, section 5 there), which the monitor watches for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import pgd
from robustq.errors import RecipeError
from robustq.hardening.methods.method import AdversarialTraining, Step, crafting, mode_errors, task_step
from robustq.recipe.schema import number_errors


@dataclass(frozen=True, kw_only=True)
class FgsmRsSettings:
    """The ``[fgsm-rs]`` table of a recipe.

    Args:
        step_scale: the step as a multiple of epsilon; 1.25 is the paper's 10/255 at 8/255 (its section 4).
        batch_norm: of the crafting pass (:data:`.crafting.MODES`); ``train`` as in the paper's code.
    """

    step_scale: float = 1.25
    batch_norm: str = "train"

    def __post_init__(self) -> None:
        faults = number_errors("fgsm-rs.step_scale", self.step_scale, low=0, high=1000, above=True)
        faults += mode_errors("fgsm-rs.batch_norm", self.batch_norm)
        if faults:
            raise RecipeError("; ".join(faults))


class FgsmRs(AdversarialTraining[FgsmRsSettings]):
    """One crafting step from a random point of the ball, then one step of training.

    Deviation from the paper's Algorithm 3: x + delta_0 is clamped to [0, 1] as well (its code does so too).

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the ``[fgsm-rs]`` table.
        epsilon: radius of the threat model, in [0, 1].
        generator: CPU generator of the random starts.
        cross_entropy: the task loss; crafting ascends it without label smoothing.
    """

    passes = "2 forward + 2 backward passes"

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """One projected step from a uniform point: PGD-1 with a long step."""
        # No two images are further apart than 1, so a longer step would be projected to the same place.
        step_size = min(self.settings.step_scale * self.epsilon, 1.0)
        with crafting(self.model, self.settings.batch_norm):
            return pgd(self.model, x, y, epsilon=self.epsilon, step_size=step_size, steps=1, generator=self.generator)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Cross-entropy of x_adv."""
        return task_step(self.model, x_adv, y, cross_entropy=self.cross_entropy)
