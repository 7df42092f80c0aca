"""LIET: label information elimination training (github.com/fzjcdt/LIET, "Mitigating Catastrophic Overfitting in Fast
Adversarial Training via Label Information Elimination").

1. every 20 batches, for each class k: G_k = epsilon sign(grad CE(f(grey), k)), of an image whose pixels are all 0.5
2. delta = G_y, in which a random share of the values (0.1 to 0.5) is noise U(-epsilon, epsilon)
3. x_0 = x + delta or x - delta, by one coin for the batch
4. x_adv = P(x_0 + epsilon sign(grad CE(x_0)))
5. loss = CE(x_adv) + lambda JS(f(x_0), f(x_adv)), the Jensen-Shannon divergence of the two softmax distributions

lambda rises linearly and reaches its value in the last epoch. The labels of steps 1, 4 and 5 are smoothed: 1 - s for
the label, and s in random shares over the other classes. Above 8/255 the noise of step 2 is twice as wide and step 4
has no projection. All of it as in the authors' code, which averages the weights (``ema_decay`` of a recipe).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustq.hardening.methods.method import AdversarialTraining, LossOutput, MethodContext, attack_generation
from robustq.hardening.methods.settings import MethodSettings, bn_mode, number
from robustq.hardening.methods.start_logits import StartLogits

_SMALL_EPSILON = 8 / 255 + 1e-7
"""Largest radius with projection; with the rounding of float32."""


@dataclass(frozen=True, kw_only=True)
class LietSettings(MethodSettings):
    """The ``[liet]`` table of a recipe. Defaults are those of the authors' code for CIFAR-10.

    Args:
        divergence_weight: lambda in the last epoch.
        least_noise, most_noise: range of the share of values that are noise; drawn for each batch.
        renew_batches: batches after which G is computed again.
        random_smoothing: s; with 0 the recipe's ``label_smoothing`` counts.
        batch_norm: during the pass of x_0, see :data:`.settings.BATCH_NORM_MODES`.
    """

    method = "liet"

    divergence_weight: float = number(100.0, low=0, high=100_000)
    least_noise: float = number(0.1, low=0, high=1)
    most_noise: float = number(0.5, low=0, high=1)
    renew_batches: int = number(20, low=1, high=1_000_000, integer=True)
    random_smoothing: float = number(0.6, low=0, high=1)
    batch_norm: str = bn_mode("train")


class Liet(AdversarialTraining):
    """One attack step from a perturbation of the label's class, then one training step that keeps both outputs close.

    Deviation: where the loss of a batch is computed again, its random labels are the same.
    """

    settings: LietSettings

    carried = ("guides", "progress")  # G (K, C, H, W); (2,) int64: the epoch, the batches that it has had

    def __init__(self, context: MethodContext, settings: LietSettings) -> None:
        super().__init__(context, settings)
        self.epochs = context.epochs
        self.guides = torch.zeros((context.classes, *context.image_shape), device=context.device)
        self.progress = torch.zeros(2, dtype=torch.int64)
        self.start = StartLogits(self.model, settings.batch_norm)
        self._targets = torch.empty(0)

    @property
    def passes(self) -> str:
        """The pass of x_0 with its gradients by the attack and by the loss, and the training pass."""
        return f"{2 if self.start.keeps_graph else 3} forward + 3 backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Raise lambda; the first batch of an epoch renews G."""
        self.progress = torch.tensor([epoch, 0])

    @property
    def weight(self) -> float:
        """Lambda of this epoch."""
        return self.settings.divergence_weight * (int(self.progress[0]) + 1) / self.epochs

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Steps 1 to 4; counts the batch."""
        settings, epsilon = self.settings, self.epsilon
        if self.progress[1] % int(settings.renew_batches) == 0:
            self._renew_guides(x)
        self.progress[1] += 1
        within = epsilon <= _SMALL_EPSILON
        places, values = self.uniform(*x.shape, like=x), self.uniform(*x.shape, like=x)
        share, coin = torch.rand(2, generator=self.generator)
        share = settings.least_noise + share * (settings.most_noise - settings.least_noise)
        noise = (1 if within else 2) * epsilon * (2 * values.to(x) - 1)
        delta = torch.where(places < share, noise, self.guides[y])
        start = (x + (delta if coin >= 0.5 else -delta)).clamp(0.0, 1.0)
        targets = self._smoothed(y)
        gradient = self.start.gradient(start, lambda logits: self.cross_entropy(logits, targets))
        self._targets = self._smoothed(y)
        moved = start + epsilon * gradient.sign()
        if within:
            moved = torch.minimum(torch.maximum(moved, x - epsilon), x + epsilon)
        return moved.clamp(0.0, 1.0)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Step 5. The first call reuses f(x_0) of :meth:`perturb` (:meth:`.start_logits.StartLogits.take`)."""
        logits = self.model(x_adv)
        task = self.cross_entropy(logits, self._targets)
        gap = jensen_shannon(logits, self.start.take())
        return LossOutput.of(task, logits, weight=self.weight, jensen_shannon=gap)

    def _renew_guides(self, x: Tensor) -> None:
        classes = torch.arange(len(self.guides), device=x.device)
        targets = self._smoothed(classes)
        grey = torch.full_like(self.guides, 0.5, dtype=x.dtype).requires_grad_()
        with attack_generation(self.model, "eval"):
            (gradient,) = torch.autograd.grad(self.cross_entropy(self.model(grey), targets), grey)
        self.guides = self.epsilon * gradient.sign()

    def _smoothed(self, y: Tensor) -> Tensor:
        """Target distributions (B, K) of labels (B,); with s = 0 the labels themselves."""
        s, classes = self.settings.random_smoothing, len(self.guides)
        if s == 0 or classes < 2:
            return y
        label = functional.one_hot(y, classes).to(self.guides)
        others = self.uniform(len(y), classes, like=self.guides) * (1 - label)
        return (1 - s) * label + s * others / others.sum(dim=1, keepdim=True)


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """Jensen-Shannon divergence of softmax(logits) and softmax(others), both (B, K); mean over the batch."""
    log_p, log_q = functional.log_softmax(others, dim=1), functional.log_softmax(logits, dim=1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    gaps = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return gaps.sum(dim=1).mean() / 2
