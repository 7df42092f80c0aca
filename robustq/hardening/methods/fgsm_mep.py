"""FGSM-MEP: FGSM from a start that past epochs have found (Jia et al. 2022, arXiv:2207.08859, section 3.4).

Every training image keeps a perturbation delta and a momentum m of its gradients. For a batch, with x_0 = x + delta,

1. g = grad CE(x_0), m = g / ||g||_1 + mu m                       (the norm is that of the whole batch)
2. x_adv = x + clip(delta + alpha sign(g), epsilon)               which the weights are trained on
3. delta = clip(delta + alpha sign(m), epsilon)                   for the next epoch
4. loss = CE(x_adv) + lambda mean (f(x_adv) - f(x_0))^2           the mean is over the batch and the logits

Every 40 epochs delta starts anew from random corners of the ball, and m from 0. The paper smooths the labels; its share
of 0.6 for the label, of ten classes, is a smoothing of 0.4444 (see :class:`.method.CrossEntropy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import RecipeError
from robustq.hardening.methods.method import PLAIN_CROSS_ENTROPY, CrossEntropy, Step, crafting, mode_errors, normalised
from robustq.recipe.schema import number_errors

_ROWS_AT_ONCE = 1024
"""Images whose start is drawn at a time: the draw is made on the CPU, which need not hold a training set of numbers."""


@dataclass(frozen=True, kw_only=True)
class FgsmMepSettings:
    """The ``[fgsm-mep]`` table of a recipe. Defaults are those of the paper and its code.

    Args:
        step_scale: alpha as a multiple of epsilon.
        momentum: mu.
        mse_weight: lambda; 0 leaves the term out.
        reset_epochs: epochs after which the perturbations start anew.
        prior_gradient: let lambda's gradient flow through f(x_0) too, as the paper does: one backward pass more.
        batch_norm: of the pass through x_0, see :data:`.crafting.MODES`.
    """

    step_scale: float = 1.0
    momentum: float = 0.3
    mse_weight: float = 10.0
    reset_epochs: int = 40
    prior_gradient: bool = True
    batch_norm: str = "train"

    def __post_init__(self) -> None:
        faults = number_errors("fgsm-mep.step_scale", self.step_scale, low=0, high=1000, above=True)
        faults += number_errors("fgsm-mep.momentum", self.momentum, low=0, high=1)
        faults += number_errors("fgsm-mep.mse_weight", self.mse_weight, low=0, high=100_000)
        faults += number_errors("fgsm-mep.reset_epochs", self.reset_epochs, low=1, high=100_000, integer=True)
        faults += mode_errors("fgsm-mep.batch_norm", self.batch_norm)
        if faults:
            raise RecipeError("; ".join(faults))


class FgsmMep:
    """One crafting step from each image's own start, then one step of training that holds both answers together.

    A perturbation belongs to the training image, whatever crop and mirroring this epoch draws, as in the paper's code.
    Memory: delta and m, each as large as the training images in float32 (CIFAR-10: 1.1 GB), and as much in the saved
    state. Deviation from that code: x_0 is clamped to [0, 1] too, and its gradient is taken there.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the ``[fgsm-mep]`` table.
        epsilon: radius of the threat model, in [0, 1].
        image_shape: (C, H, W).
        samples: number of training images.
        device: where delta and m live.
        generator: CPU generator of the starts.
        cross_entropy: the task loss, for x_0 as for x_adv.
    """

    adversarial = True
    repeats = 1

    def __init__(
        self,
        model: nn.Module,
        settings: FgsmMepSettings,
        *,
        epsilon: float,
        image_shape: tuple[int, int, int],
        samples: int,
        device: torch.device,
        generator: torch.Generator,
        cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY,
    ) -> None:
        self.model = model
        self.settings = settings
        self.epsilon = epsilon
        self.cross_entropy = cross_entropy
        self.perturbations = torch.zeros((samples, *image_shape), device=device)
        self.momenta = torch.zeros((samples, *image_shape), device=device)
        self._generator = generator
        self._start = torch.empty(0)
        self._prior: Tensor | None = None

    @property
    def passes(self) -> str:
        """Cost of a batch."""
        again = self._through_prior and not self._keeps_graph
        return f"{3 if again else 2} forward + {3 if self._through_prior else 2} backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Start anew in the first epoch and whenever ``reset_epochs`` have gone by."""
        if epoch % int(self.settings.reset_epochs):
            return
        size = min(self.settings.step_scale, 1.0) * self.epsilon
        for rows in torch.split(self.perturbations, _ROWS_AT_ONCE):
            signs = 2 * torch.randint(0, 2, rows.shape, generator=self._generator, dtype=torch.int8) - 1
            rows.copy_(size * signs.to(rows))
        self.momenta.zero_()

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """Steps 1 to 3: x_adv of this batch; moves delta and m of its images."""
        settings, epsilon = self.settings, self.epsilon
        delta = self.perturbations[places]
        start = (x + delta).clamp(0.0, 1.0).requires_grad_()
        mode = normalised if self._keeps_graph else crafting
        with mode(self.model, settings.batch_norm):
            prior = self.model(start)
            (gradient,) = torch.autograd.grad(self.cross_entropy(prior, y), start, retain_graph=self._keeps_graph)
        # A batch without any gradient has no direction either: 0 and not NaN.
        norm = gradient.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / norm + settings.momentum * self.momenta[places]
        step = settings.step_scale * epsilon
        moved = (delta + step * momentum.sign()).clamp(-epsilon, epsilon)
        self.momenta[places] = momentum
        # Where this epoch's crop is black or white there is less room than epsilon; stored so, as in the paper's code.
        self.perturbations[places] = torch.minimum(torch.maximum(moved, -x), 1.0 - x)
        self._start = start.detach()
        self._prior = prior if self._keeps_graph else None if self._through_prior else prior.detach()
        return (x + (delta + step * gradient.sign()).clamp(-epsilon, epsilon)).clamp(0.0, 1.0)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Step 4. The first call takes f(x_0) from :meth:`perturb`, so the weights must still be the same; where it has
        a gradient, any further call computes it again, at the weights of then (it moves the running statistics in
        ``batch_norm = "train"``).
        """
        logits = self.model(x_adv)
        task = self.cross_entropy(logits, y)
        if self.settings.mse_weight == 0:
            return Step(task, {"cross_entropy": task.detach()}, logits.detach())
        gap = functional.mse_loss(logits, self._prior_logits())
        return Step(
            task + self.settings.mse_weight * gap,
            {"cross_entropy": task.detach(), "mse": gap.detach()},
            logits.detach(),
        )

    def after_backward(self, x_adv: Tensor) -> None:
        """:meth:`perturb` has done everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """Both delta and m, each (N, C, H, W) float32, and the generator of the starts."""
        return {
            "perturbations": self.perturbations,
            "momenta": self.momenta,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        self.perturbations.copy_(state["perturbations"])
        self.momenta.copy_(state["momenta"])
        self._generator.set_state(state["generator"].cpu())

    @property
    def _through_prior(self) -> bool:
        return self.settings.prior_gradient and self.settings.mse_weight != 0

    @property
    def _keeps_graph(self) -> bool:
        # Under running statistics BatchNorm's backward pass needs those of its forward pass, which the pass of x_adv
        # moves in between: the answer is then computed again, behind that pass.
        return self._through_prior and self.settings.batch_norm != "eval"

    def _prior_logits(self) -> Tensor:
        kept = self._prior
        if kept is not None:
            if self._through_prior:
                self._prior = None  # its graph serves one backward pass
            return kept
        with normalised(self.model, self.settings.batch_norm):
            logits: Tensor = self.model(self._start)
        return logits
