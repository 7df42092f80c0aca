"""FGSM-MEP: FGSM from the perturbation of earlier epochs (Jia et al. 2022, arXiv:2207.08859, section 3.4).

Every training image has a perturbation delta and a momentum m of its gradients. For a batch, with x_0 = x + delta,

1. g = grad CE(x_0), m = g / ||g||_1 + mu m                       (the norm is that of the whole batch)
2. x_adv = x + clip(delta + alpha sign(g), epsilon)               which the weights are trained on
3. delta = clip(delta + alpha sign(m), epsilon)                   for the next epoch
4. loss = CE(x_adv) + lambda mean (f(x_adv) - f(x_0))^2           the mean is over the batch and the logits

Every 40 epochs delta restarts from random corners of the ball, and m from 0. The paper's label smoothing gives the
label a share of 0.6; with ten classes that is a smoothing of 0.4444 (see :class:`.method.MethodContext`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustq.hardening.methods.method import AdversarialTraining, LossOutput, MethodContext
from robustq.hardening.methods.settings import MethodSettings, bn_mode, number
from robustq.hardening.methods.start_logits import StartLogits

_ROWS_AT_ONCE = 1024
"""Images whose start is drawn at a time: limits the memory of the draw."""


@dataclass(frozen=True, kw_only=True)
class FgsmMepSettings(MethodSettings):
    """The ``[fgsm-mep]`` table of a recipe. Defaults are those of the paper and its code.

    Args:
        step_scale: alpha as a multiple of epsilon.
        momentum: mu.
        mse_weight: lambda; 0 leaves the term out.
        reset_epochs: epochs after which the perturbations restart.
        prior_gradient: differentiate lambda's term through f(x_0) too, as the paper does: one more backward pass.
        batch_norm: during the pass of x_0, see :data:`.settings.BATCH_NORM_MODES`.
    """

    method = "fgsm-mep"

    step_scale: float = number(1.0, low=0, high=1000, above=True)
    momentum: float = number(0.3, low=0, high=1)
    mse_weight: float = number(10.0, low=0, high=100_000)
    reset_epochs: int = number(40, low=1, high=100_000, integer=True)
    prior_gradient: bool = True
    batch_norm: str = bn_mode("train")


class FgsmMep(AdversarialTraining):
    """One attack step from each image's own start, then one training step that keeps both logits close.

    A perturbation belongs to the training image, whatever the augmentation, as in the paper's code. Memory: delta and
    m, each as large as the training images in float32 (CIFAR-10: 1.1 GB), and as much in the saved state. Label
    smoothing applies to x_0 too. Deviation from that code: x_0 is clamped to [0, 1] before its gradient is taken.
    """

    settings: FgsmMepSettings

    carried = ("perturbations", "momenta")  # delta and m, each (N, C, H, W) float32

    def __init__(self, context: MethodContext, settings: FgsmMepSettings) -> None:
        super().__init__(context, settings)
        shape = (context.samples, *context.image_shape)
        self.perturbations = torch.zeros(shape, device=context.device)
        self.momenta = torch.zeros(shape, device=context.device)
        through_prior = settings.prior_gradient and settings.mse_weight != 0
        self.prior = StartLogits(self.model, settings.batch_norm, differentiated=through_prior)

    @property
    def passes(self) -> str:
        """The pass of x_0 and the training pass; one or two more for lambda's term."""
        through_prior = self.prior.differentiated
        again = through_prior and not self.prior.keeps_graph
        return f"{3 if again else 2} forward + {3 if through_prior else 2} backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Restart the perturbations in the first epoch and after every ``reset_epochs``."""
        if epoch % int(self.settings.reset_epochs):
            return
        size = min(self.settings.step_scale, 1.0) * self.epsilon
        for rows in torch.split(self.perturbations, _ROWS_AT_ONCE):
            rows.copy_(size * self.signs(*rows.shape, like=rows))
        self.momenta.zero_()

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Steps 1 to 3: x_adv of this batch; updates delta and m of its images."""
        settings, epsilon = self.settings, self.epsilon
        delta = self.perturbations[indices]
        start = (x + delta).clamp(0.0, 1.0)
        gradient = self.prior.gradient(start, lambda logits: self.cross_entropy(logits, y))
        # A batch without any gradient: 0 and not NaN.
        norm = gradient.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / norm + settings.momentum * self.momenta[indices]
        step = settings.step_scale * epsilon
        moved = (delta + step * momentum.sign()).clamp(-epsilon, epsilon)
        self.momenta[indices] = momentum
        # Clipped to [0, 1] of this epoch's crop, as in the paper's code.
        self.perturbations[indices] = torch.minimum(torch.maximum(moved, -x), 1.0 - x)
        return (x + (delta + step * gradient.sign()).clamp(-epsilon, epsilon)).clamp(0.0, 1.0)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Step 4. The first call reuses f(x_0) of :meth:`perturb` (:meth:`.start_logits.StartLogits.take`)."""
        logits = self.model(x_adv)
        task = self.cross_entropy(logits, y)
        if self.settings.mse_weight == 0:
            return LossOutput.of(task, logits)
        gap = functional.mse_loss(logits, self.prior.take())
        return LossOutput.of(task, logits, weight=self.settings.mse_weight, mse=gap)
