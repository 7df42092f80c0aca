"""Free adversarial training, AdvFree in the ODG-Q paper's tables (Shafahi et al. 2019, arXiv:1904.12843, Algorithm 1).

Each batch is trained on m times. Each backward pass gives the gradient of the weights and of the images; the latter
updates a perturbation that the next pass and the next batch start from. The images cost no pass of their own: a run of
E epochs takes E m natural epochs (the paper trains E / m of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.hardening.methods.method import Method, MethodContext
from robustq.hardening.methods.settings import MethodSettings, number


@dataclass(frozen=True, kw_only=True)
class FreeSettings(MethodSettings):
    """The ``[free]`` table of a recipe.

    Args:
        repeats: m, training steps on each batch (the tables: 4 and 6; the paper: 8 on CIFAR-10, 4 on ImageNet).
        step_scale: the step of the perturbation as a multiple of epsilon (the paper: 1).
    """

    method = "free"

    repeats: int = number(4, low=1, high=1000, integer=True)
    step_scale: float = number(1.0, low=0, high=1000, above=True)


class Free(Method):
    """m training steps on each batch; after each, the perturbation follows the gradient of the images.

    Each slot of the batch has its own perturbation; a short last batch uses the first slots. Label smoothing reaches
    the perturbation too. Deviation from the paper's code: the gradient is taken at the clamped images and not through
    the clamp, where a pixel outside [0, 1] would have none and its perturbation would never change again.
    """

    settings: FreeSettings

    adversarial = True
    carried = ("perturbation",)  # delta, (slots, C, H, W) float32

    def __init__(self, context: MethodContext, settings: FreeSettings) -> None:
        super().__init__(context, settings)
        self.repeats = int(settings.repeats)
        slots = min(context.batch_size, context.samples)
        self.perturbation = torch.zeros((slots, *context.image_shape), device=context.device)

    @property
    def passes(self) -> str:
        """All repeats together."""
        plural = "es" if self.repeats > 1 else ""
        return f"{self.repeats} forward + {self.repeats} backward pass{plural}"

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """The images x + delta in [0, 1]: a leaf whose gradient :meth:`after_backward` reads."""
        return (x + self.perturbation[: len(x)]).clamp(0.0, 1.0).requires_grad_()

    def after_backward(self, x_adv: Tensor) -> None:
        """Delta = clip(delta + epsilon sign(gradient), epsilon), for the slots of this batch."""
        assert x_adv.grad is not None  # the loss was differentiated through it
        step = self.settings.step_scale * self.epsilon * x_adv.grad.sign()
        moved = self.perturbation[: len(x_adv)] + step
        self.perturbation[: len(x_adv)] = moved.clamp(-self.epsilon, self.epsilon)
