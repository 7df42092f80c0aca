"""TRADES (Zhang et al. 2019, arXiv:1901.08573, Eq. 5 and Algorithm 1).

Loss = CE(f(x), y) + beta KL(f(x) || f(x_adv)), where x_adv maximises the same divergence inside the ball: accuracy on
clean images, smoothness around them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import tpgd
from robustq.attacks.losses import kl
from robustq.hardening.methods.method import AdversarialTraining, LossOutput
from robustq.hardening.methods.settings import AUTO, MethodSettings, bn_mode, number, size
from robustq.recipe import parse_epsilon


@dataclass(frozen=True, kw_only=True)
class TradesSettings(MethodSettings):
    """The ``[trades]`` table of a recipe.

    Args:
        kl_weight: beta, the paper's 1/lambda (6 in its strongest runs).
        steps: of attack generation (the paper: 10; 1 is the cheap variant).
        step_size: ``auto`` (see :data:`.settings.AUTO`), or a length such as ``"2/255"``.
        start_size: half the width of the uniform random start, at least 1/255. Deviation from the paper's start of
            0.001 N(0, 1): at x itself the divergence has no gradient, and an 8-bit input quantizer rounds 95% of that
            noise back to x.
        batch_norm: during attack generation (:data:`.settings.BATCH_NORM_MODES`); ``eval`` as in the paper's code.
    """

    method = "trades"

    kl_weight: float = number(6.0, low=0, high=100_000)
    steps: int = number(10, low=1, high=1000, integer=True)
    step_size: str | float = size(AUTO, words=(AUTO,))
    start_size: str | float = size("1/255", least=1 / 255)
    batch_norm: str = bn_mode("eval")


class Trades(AdversarialTraining):
    """Attack generation without labels, then one training step on clean and adversarial images."""

    settings: TradesSettings

    @property
    def passes(self) -> str:
        """The clean logits, K attack passes, and two training passes."""
        steps = int(self.settings.steps)
        return f"{steps + 3} forward + {steps + 2} backward passes"

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """TPGD inside the ball and inside [0, 1]."""
        steps, start = int(self.settings.steps), parse_epsilon(self.settings.start_size)
        return self.generate(tpgd, x, y, step_size=self.step_size(), steps=steps, start=start)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Both terms, differentiated through both forward passes; in train mode each batch has its own statistics."""
        clean_logits = self.model(x)
        logits = self.model(x_adv)
        task = self.cross_entropy(clean_logits, y)
        return LossOutput.of(task, logits, weight=self.settings.kl_weight, kl=kl(logits, clean_logits).mean())
