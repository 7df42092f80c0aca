"""Adversarial training with K-step PGD (Madry et al. 2018, arXiv:1706.06083), and with BIM.

The weights minimise the cross-entropy of PGD-K's images. PGD without its random start is BIM (Kurakin et al. 2017,
arXiv:1611.01236). The ODG-Q paper's tables have 5-PGD, 7-PGD and 5-BIM.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import pgd
from robustq.hardening.methods.method import AdversarialTraining
from robustq.hardening.methods.settings import AUTO, MethodSettings, bn_mode, number, size


@dataclass(frozen=True, kw_only=True)
class PgdSettings(MethodSettings):
    """The ``[pgd]`` table of a recipe.

    Args:
        steps: K; 7 in arXiv:1706.06083 for CIFAR-10.
        step_size: ``auto`` (see :data:`.settings.AUTO`), or a length such as ``"4/255"``. The ODG-Q paper
            gives 4/255 for the attacks of its tables and nothing for training.
        random_start: from a uniform point of the ball (PGD) or from the image itself (BIM).
        batch_norm: during attack generation, see :data:`.settings.BATCH_NORM_MODES`.
    """

    method = "pgd"

    steps: int = number(7, low=1, high=1000, integer=True)
    step_size: str | float = size(AUTO, words=(AUTO,))
    random_start: bool = True
    batch_norm: str = bn_mode("eval")


class Pgd(AdversarialTraining):
    """K steps of attack generation, then one training step on the resulting images."""

    settings: PgdSettings

    @property
    def passes(self) -> str:
        """K attack passes and the training pass."""
        count = int(self.settings.steps) + 1
        return f"{count} forward + {count} backward passes"

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """PGD-K inside the ball and inside [0, 1]."""
        steps, random_start = int(self.settings.steps), self.settings.random_start
        return self.generate(pgd, x, y, step_size=self.step_size(), steps=steps, random_start=random_start)
