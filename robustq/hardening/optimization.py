"""One optimizer step: losses of a batch, gradients, learning rate.

The learning rate as a pure function of how far training has come.

The optimiser of every method.

How one batch becomes new weights, whatever the method: crafting, the loss, its gradient, the optimiser's step, and
the options that a recipe may set for each of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Batch
from robustq.hardening.averaging import Average
from robustq.hardening.awp import worst_weights
from robustq.hardening.methods.method import Method, Step
from robustq.hardening.precision import CompiledForward, computed_in, counts_codes
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.quant.weights_once import SharedWeights
from robustq.recipe import Recipe
from robustq.recipe.schema import INTEGER


def learning_rate(recipe: Recipe, epochs_done: float) -> float:
    """Learning rate after ``epochs_done`` epochs (a fraction within an epoch).

    Linear warm-up from 0 over ``warmup_epochs``; then ``cosine``: lr * (1 + cos(pi * t)) / 2 with t from 0 to 1 over
    the remaining epochs (arXiv:1608.03983 without restarts), or ``steps``: lr / 10^(milestones passed).
    """
    if epochs_done < recipe.warmup_epochs:
        return recipe.lr * epochs_done / recipe.warmup_epochs
    if recipe.schedule == "steps":
        return recipe.lr / 10.0 ** sum(epochs_done >= milestone for milestone in recipe.milestones)
    remaining = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    share = min((epochs_done - recipe.warmup_epochs) / remaining, 1.0)
    return recipe.lr * (1.0 + math.cos(math.pi * share)) / 2.0


class SGD(torch.optim.SGD):
    """torch's own SGD without the decorators that keep torch's compiler out of it: they would load that compiler, which
    takes seconds, and a step of ours is not compiled.
    """

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def build_optimizer(model: nn.Module, recipe: Recipe) -> SGD:
    """SGD with momentum; weight decay on everything but learned activation thresholds.

    The thresholds are logarithms: decay would pull every clipping range towards 1, whatever the activations are.
    """
    thresholds = [module.log_threshold for module in learned_thresholds(model).values()]
    held = {id(parameter) for parameter in thresholds}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in held]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if thresholds:
        groups.append({"params": thresholds, "weight_decay": 0.0})
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


class Descent:
    """One step of the optimiser after the other.

    Args:
        model: trained in place.
        method: bound to ``model``.
        recipe: ``awp_gamma``, ``awp_warmup_epochs``, ``clip_gradient``, ``ema_decay``, ``precision``,
            ``side_precision``, ``compile``, ``cuda_graphs`` and the optimiser's own keys. At their defaults each step
            is the optimiser's on the method's loss, and nothing else is computed.
    """

    def __init__(self, model: nn.Module, method: Method, recipe: Recipe) -> None:
        self.model = model
        self.method = method
        self.recipe = recipe
        self.optimizer = build_optimizer(model, recipe)
        self._weights = SharedWeights(model)
        self._integers: Any = None
        self._compiled = (
            CompiledForward(model, batch_size=recipe.batch_size, cuda_graphs=recipe.cuda_graphs)
            if recipe.compile
            else None
        )
        self.average = Average(model, decay=recipe.ema_decay) if recipe.ema_decay else None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def as_written(self) -> None:
        """Compile nothing from now on: every layer is called and every hook on it runs."""
        self._compiled = None

    def step(self, batch: Batch, *, epoch: int) -> Step:
        """One repeat of a batch: new images, new weights; their loss and logits.

        Args:
            batch: training images.
            epoch: epochs that have ended.
        """
        if self.recipe.side_precision == INTEGER and self._integers is None:
            self._integers = _integer_convolutions(self.model, batch.x)
        compiled = nullcontext() if self._compiled is None else self._compiled.in_place(len(batch.y))
        with compiled, computed_in(self.model, self.recipe.precision, side=self.recipe.side_precision):
            outcome = self._descend(batch, epoch=epoch)
        if self.average is not None:
            self.average.update(self.model)
        return outcome

    def _descend(self, batch: Batch, *, epoch: int) -> Step:
        x, y, places = batch.x, batch.y, batch.indices
        recipe = self.recipe
        if recipe.awp_gamma and epoch >= recipe.awp_warmup_epochs:
            with self._quantized_once():
                x_adv = self.method.perturb(x, y, places)

            def loss() -> Tensor:
                return self.method.loss(x, x_adv, y, places).loss

            with worst_weights(self.model, loss, gamma=recipe.awp_gamma):
                outcome = self._gradient(batch, x_adv)
        else:
            with self._quantized_once():
                x_adv = self.method.perturb(x, y, places)
                outcome = self._gradient(batch, x_adv)
        if recipe.clip_gradient:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_gradient)
        self.optimizer.step()
        return outcome

    @contextmanager
    def _quantized_once(self) -> Iterator[None]:
        with self._weights.quantized_once(), self._integers.in_place() if self._integers else nullcontext():
            yield

    def _gradient(self, batch: Batch, x_adv: Tensor) -> Step:
        outcome = self.method.loss(batch.x, x_adv, batch.y, batch.indices)
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        self.method.after_backward(x_adv)
        return outcome


def _integer_convolutions(model: nn.Module, images: Tensor) -> Any:
    """The network's convolutions of codes, none where the device cannot convolve them."""
    # Only where asked for: it makes an operator known to torch, which takes a moment.
    from robustq.models.quant.integer_convolution import IntegerConvolutions

    return IntegerConvolutions(model, images[:2]) if counts_codes(images.device) else ()
