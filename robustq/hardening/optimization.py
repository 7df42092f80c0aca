"""One training step of any method: learning rate, attack generation, loss, gradients, SGD."""

from __future__ import annotations

import math
from contextlib import nullcontext
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Batch
from robustq.hardening.averaging import WeightAverage
from robustq.hardening.awp import adversarial_weights
from robustq.hardening.methods.method import LossOutput, Method
from robustq.hardening.precision import has_integer_convolution, in_precision
from robustq.models.compiled import CompiledForward
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.quant.shared_weights import SharedWeights
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
    """torch's SGD without the decorators for torch.compile, whose import takes seconds."""

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def build_optimizer(model: nn.Module, recipe: Recipe) -> SGD:
    """SGD with momentum; weight decay on everything but learned activation thresholds.

    The thresholds are logarithms: decay would pull every clipping range towards 1.
    """
    thresholds = [module.log_threshold for module in learned_thresholds(model).values()]
    without_decay = {id(parameter) for parameter in thresholds}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in without_decay]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if thresholds:
        groups.append({"params": thresholds, "weight_decay": 0.0})
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


class TrainStep:
    """Optimizer steps on batches, which train ``model`` in place.

    With the recipe's defaults each step is one step of the optimizer on the method's loss, and nothing else is
    computed.
    """

    def __init__(self, model: nn.Module, method: Method, recipe: Recipe) -> None:
        self.model = model
        self.method = method
        self.recipe = recipe
        self.optimizer = build_optimizer(model, recipe)
        self.average = WeightAverage(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self._weights = SharedWeights(model)
        self._integers: Any = None
        self._compiled: CompiledForward | None = None
        if recipe.compile:
            self._compiled = CompiledForward(model, batch_size=recipe.batch_size, cuda_graphs=recipe.cuda_graphs)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def use_eager(self) -> None:
        """Do not use compiled code from now on, so that hooks on all layers run."""
        self._compiled = None

    def step(self, batch: Batch, *, epoch: int) -> LossOutput:
        """One repeat of a batch after ``epoch`` finished epochs: new images, new weights; their loss and logits."""
        recipe = self.recipe
        if recipe.side_precision == INTEGER and self._integers is None:
            # Imported on demand: it registers an operator with torch, which takes a moment.
            from robustq.models.quant.integer_convolution import IntegerConvolutions

            is_available = has_integer_convolution(batch.x.device)
            self._integers = IntegerConvolutions(self.model, batch.x[:2]) if is_available else ()
        compiled = nullcontext() if self._compiled is None else self._compiled.in_place(len(batch.y))
        with compiled, in_precision(self.model, recipe.precision, side=recipe.side_precision):
            output = self._compute_gradient(batch, epoch=epoch)
            if recipe.clip_gradient:
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_gradient)
            self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return output

    def _compute_gradient(self, batch: Batch, *, epoch: int) -> LossOutput:
        x, y, indices = batch.x, batch.y, batch.indices
        gamma = self.recipe.awp_gamma if epoch >= self.recipe.awp_warmup_epochs else 0.0
        integers = nullcontext() if not self._integers else self._integers.in_place()
        with self._weights.quantized_once(), integers:
            x_adv = self.method.perturb(x, y, indices)
            if not gamma:
                return self._backward(batch, x_adv)

        def loss() -> Tensor:
            return self.method.loss(x, x_adv, y, indices).loss

        with adversarial_weights(self.model, loss, gamma=gamma):
            return self._backward(batch, x_adv)

    def _backward(self, batch: Batch, x_adv: Tensor) -> LossOutput:
        output = self.method.loss(batch.x, x_adv, batch.y, batch.indices)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self.method.after_backward(x_adv)
        return output
