"""Nu-AT: single-step training smoothed by the nuclear norm (Sriramanan et al., NeurIPS 2021, "Towards Efficient and
Effective Adversarial Training").

1. x_0 = x + U{-alpha, alpha}, a random corner of a smaller ball
2. g = grad CE(x_0), in every second batch plus lambda ||f(x) - f(x_0)||_* / B
3. x_adv = P(x_0 + epsilon sign(g))
4. loss = CE(x) + lambda ||f(x_adv) - f(x)||_* / B

||.||_* is the nuclear norm, the sum of the singular values, of the (B, K) matrix of a batch. lambda rises linearly from
0 in the first epoch. Steps and defaults are those of FastAT_Benchmark (github.com/fzjcdt/FastAT_Benchmark), which
averages the weights and smooths labels: see the keys ``ema_decay`` and ``label_smoothing`` of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.base import input_gradient
from robustq.attacks.losses import cross_entropy as per_image
from robustq.hardening.methods.method import AdversarialTraining, LossOutput, MethodContext, attack_generation
from robustq.hardening.methods.settings import MethodSettings, bn_mode, number


@dataclass(frozen=True, kw_only=True)
class NuAtSettings(MethodSettings):
    """The ``[nu-at]`` table of a recipe.

    Args:
        nuclear_weight: lambda behind the last epoch.
        start_scale: alpha as a multiple of epsilon.
        batch_norm: during attack generation (:data:`.settings.BATCH_NORM_MODES`).
    """

    method = "nu-at"

    nuclear_weight: float = number(4.0, low=0, high=100_000)
    start_scale: float = number(0.5, low=0, high=1)
    batch_norm: str = bn_mode("train")


class NuAt(AdversarialTraining):
    """One attack step, then one training step on clean images, whose logits stay near those of the adversarial ones.

    Deviation: the attack ascends cross-entropy without label smoothing, as in the other methods.
    """

    settings: NuAtSettings

    carried = ("progress",)  # (2,) int64: the epoch, the batches that it has had

    def __init__(self, context: MethodContext, settings: NuAtSettings) -> None:
        super().__init__(context, settings)
        self.epochs = context.epochs
        self.progress = torch.zeros(2, dtype=torch.int64)

    @property
    def passes(self) -> str:
        """The attack pass and two training passes; in every second batch the clean logits of the attack too."""
        return "3 forward + 3 backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Raise lambda."""
        self.progress = torch.tensor([epoch, 0])

    @property
    def weight(self) -> float:
        """Lambda of this epoch."""
        return self.settings.nuclear_weight * int(self.progress[0]) / self.epochs

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Steps 1 to 3; counts the batch."""
        signs = self.signs(*x.shape, like=x)
        start = (x + self.settings.start_scale * self.epsilon * signs).clamp(0.0, 1.0)
        weight = self.weight if self.progress[1] % 2 else 0.0
        self.progress[1] += 1
        with attack_generation(self.model, self.settings.batch_norm):
            clean = None
            if weight:
                with torch.no_grad():
                    clean = self.model(x)

            def rising(logits: Tensor) -> Tensor:
                losses = per_image(logits, y)
                return losses if clean is None else losses + weight * nuclear_norm(logits, clean)

            gradient = input_gradient(self.model, start, rising).gradient
        moved = start + self.epsilon * gradient.sign()
        return torch.minimum(torch.maximum(moved, x - self.epsilon), x + self.epsilon).clamp(0.0, 1.0)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Step 4, differentiated through both forward passes; in train mode each batch has its own statistics."""
        logits = self.model(x_adv)
        clean = self.model(x)
        gap = nuclear_norm(logits, clean)
        return LossOutput.of(self.cross_entropy(clean, y), logits, weight=self.weight, nuclear_norm=gap)


def nuclear_norm(logits: Tensor, others: Tensor) -> Tensor:
    """Sum of the singular values of the difference of two (B, K) matrices, divided by B."""
    norm: Tensor = torch.linalg.matrix_norm(logits - others, ord="nuc") / len(logits)
    return norm
