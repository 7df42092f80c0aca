"""How one batch becomes new weights, whatever the method: crafting, the loss, its gradient, the optimiser's step, and
the options that a recipe may set for each of these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from robustq.data import Batch
from robustq.hardening.average import Average
from robustq.hardening.awp import worst_weights
from robustq.hardening.methods.method import Method, Step
from robustq.hardening.optimizer import build_optimizer
from robustq.recipe import Recipe


class Descent:
    """One step of the optimiser after the other.

    Args:
        model: trained in place.
        method: bound to ``model``.
        recipe: ``awp_gamma``, ``awp_warmup_epochs``, ``clip_gradient``, ``ema_decay`` and the optimiser's own keys. At
            their defaults each step is the optimiser's on the method's loss, and nothing else is computed.
    """

    def __init__(self, model: nn.Module, method: Method, recipe: Recipe) -> None:
        self.model = model
        self.method = method
        self.recipe = recipe
        self.optimizer = build_optimizer(model, recipe)
        self.average = Average(model, decay=recipe.ema_decay) if recipe.ema_decay else None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def step(self, batch: Batch, *, epoch: int) -> Step:
        """One repeat of a batch: new images, new weights; their loss and logits.

        Args:
            batch: training images.
            epoch: epochs that have ended.
        """
        x, y, places = batch.x, batch.y, batch.places
        method, recipe = self.method, self.recipe
        x_adv = method.perturb(x, y, places)
        worst: AbstractContextManager[None] = nullcontext()
        if recipe.awp_gamma and epoch >= recipe.awp_warmup_epochs:
            worst = worst_weights(self.model, lambda: method.loss(x, x_adv, y, places).loss, gamma=recipe.awp_gamma)
        with worst:
            outcome = method.loss(x, x_adv, y, places)
            self.optimizer.zero_grad(set_to_none=True)
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            method.after_backward(x_adv)
        if recipe.clip_gradient:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_gradient)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return outcome
