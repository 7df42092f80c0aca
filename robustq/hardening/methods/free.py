"""Free adversarial training, AdvFree in the ODG-Q paper's tables (Shafahi et al. 2019, arXiv:1904.12843, Algorithm 1).

Each batch is trained on m times over. Every one of these backward passes gives the gradient of the weights and that of
the images; the latter moves a perturbation, which the next pass and the next batch start from. So the images cost no
pass of their own, and a run of E epochs takes E m natural epochs (the paper trains E / m of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustq.errors import RecipeError
from robustq.hardening.methods.method import PLAIN_CROSS_ENTROPY, CrossEntropy, Step, task_step
from robustq.recipe.schema import number_errors


@dataclass(frozen=True, kw_only=True)
class FreeSettings:
    """The ``[free]`` table of a recipe.

    Args:
        repeats: m, how often each batch is trained on (the tables: 4 and 6; the paper: 8 on CIFAR-10, 4 on ImageNet).
        step_scale: the step of the perturbation as a multiple of epsilon (the paper: 1).
    """

    repeats: int = 4
    step_scale: float = 1.0

    def __post_init__(self) -> None:
        faults = number_errors("free.repeats", self.repeats, low=1, high=1000, integer=True)
        faults += number_errors("free.step_scale", self.step_scale, low=0, high=1000, above=True)
        if faults:
            raise RecipeError("; ".join(faults))


class Free:
    """m steps of training on each batch, between which the perturbation follows the images' gradient.

    The perturbation belongs to the slot in the batch; a short last batch uses the first slots. Deviation from the
    paper's code: the gradient is taken at the images clamped to [0, 1] and not through the clamp, where a pixel that
    the perturbation drives out of the range would have none, so that its perturbation would never move again.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the ``[free]`` table.
        epsilon: radius of the threat model, in [0, 1].
        batch_size: number of slots.
        image_shape: (C, H, W).
        samples: number of training images.
        device: where the perturbation lives.
        cross_entropy: the task loss; its label smoothing reaches the perturbation too, which has no pass of its own.
    """

    adversarial = True

    def __init__(
        self,
        model: nn.Module,
        settings: FreeSettings,
        *,
        epsilon: float,
        batch_size: int,
        image_shape: tuple[int, int, int],
        samples: int,
        device: torch.device,
        cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY,
    ) -> None:
        self.model = model
        self.settings = settings
        self.epsilon = epsilon
        self.cross_entropy = cross_entropy
        self.perturbation = torch.zeros((min(batch_size, samples), *image_shape), device=device)

    @property
    def repeats(self) -> int:
        """The paper's m."""
        return int(self.settings.repeats)

    @property
    def passes(self) -> str:
        """Cost of a batch, all repeats together."""
        plural = "es" if self.repeats > 1 else ""
        return f"{self.repeats} forward + {self.repeats} backward pass{plural}"

    def begin_epoch(self, epoch: int) -> None:
        """The perturbation goes on from epoch to epoch too."""

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """The images x + delta in [0, 1], a leaf whose gradient :meth:`after_backward` reads."""
        return (x + self.perturbation[: len(x)]).clamp(0.0, 1.0).requires_grad_()

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Cross-entropy of x_adv."""
        return task_step(self.model, x_adv, y, cross_entropy=self.cross_entropy)

    def after_backward(self, x_adv: Tensor) -> None:
        """Move delta of the slots that this batch used: clip(delta + epsilon sign(gradient), epsilon)."""
        assert x_adv.grad is not None  # the loss was differentiated through it
        step = self.settings.step_scale * self.epsilon * x_adv.grad.sign()
        moved = self.perturbation[: len(x_adv)] + step
        self.perturbation[: len(x_adv)] = moved.clamp(-self.epsilon, self.epsilon)

    def state_dict(self) -> dict[str, Tensor]:
        """The perturbation delta, (slots, C, H, W) float32."""
        return {"perturbation": self.perturbation}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put it back."""
        self.perturbation.copy_(state["perturbation"])
