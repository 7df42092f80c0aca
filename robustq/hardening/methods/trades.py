"""TRADES (Zhang et al. 2019, arXiv:1901.08573, Eq. 5 and Algorithm 1).

Loss = CE(f(x), y) + beta KL(f(x) || f(x_adv)), where x_adv maximises that same divergence inside the ball: accuracy is
asked of clean images and smoothness around them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks import tpgd
from robustq.attacks.losses import kl
from robustq.errors import RecipeError
from robustq.hardening.methods.method import (
    AUTO,
    AdversarialTraining,
    Step,
    crafting,
    length,
    length_errors,
    mode_errors,
    step_length,
)
from robustq.recipe.schema import number_errors


@dataclass(frozen=True, kw_only=True)
class TradesSettings:
    """The ``[trades]`` table of a recipe.

    Args:
        kl_weight: beta, the paper's 1/lambda (6 in its strongest runs).
        steps: crafting steps (the paper: 10; 1 is the cheap variant).
        step_size: ``auto`` (see :func:`.crafting.step_length`), or a length such as ``"2/255"``.
        start_size: half the width of the uniform random start, at least 1/255. Deviation from the paper's start of
            0.001 N(0, 1): at x itself the divergence has no gradient, and an 8-bit input quantizer rounds 95% of that
            noise back to x.
        batch_norm: of the crafting passes (:data:`.crafting.MODES`); ``eval`` as in the paper's code.
    """

    kl_weight: float = 6.0
    steps: int = 10
    step_size: str | float = AUTO
    start_size: str | float = "1/255"
    batch_norm: str = "eval"

    def __post_init__(self) -> None:
        faults = number_errors("trades.kl_weight", self.kl_weight, low=0, high=100_000)
        faults += number_errors("trades.steps", self.steps, low=1, high=1000, integer=True)
        faults += length_errors("trades.step_size", self.step_size, words=(AUTO,))
        faults += length_errors("trades.start_size", self.start_size, least=1 / 255)
        faults += mode_errors("trades.batch_norm", self.batch_norm)
        if faults:
            raise RecipeError("; ".join(faults))


class Trades(AdversarialTraining[TradesSettings]):
    """Crafting steps that know no label, then one step of training on clean and adversarial images.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the ``[trades]`` table.
        epsilon: radius of the threat model, in [0, 1].
        generator: CPU generator of the random starts.
        cross_entropy: the task loss of the clean images.
    """

    @property
    def passes(self) -> str:
        """Cost of a batch: the clean answer and K steps of crafting, then both kinds of images of training."""
        steps = int(self.settings.steps)
        return f"{steps + 3} forward + {steps + 2} backward passes"

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """TPGD inside the ball and inside [0, 1]."""
        steps = int(self.settings.steps)
        with crafting(self.model, self.settings.batch_norm):
            return tpgd(
                self.model,
                x,
                y,
                epsilon=self.epsilon,
                step_size=step_length(self.settings.step_size, epsilon=self.epsilon, steps=steps),
                steps=steps,
                start=length(self.settings.start_size),
                generator=self.generator,
            )

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Both terms, differentiated through both answers; in train mode, each batch by its own statistics."""
        clean_logits = self.model(x)
        logits = self.model(x_adv)
        task = self.cross_entropy(clean_logits, y)
        gap = kl(logits, clean_logits).mean()
        return Step(
            task + self.settings.kl_weight * gap,
            {"cross_entropy": task.detach(), "kl": gap.detach()},
            logits.detach(),
        )
