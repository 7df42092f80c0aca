"""The optimiser of every method."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import nn

from robustq.models.quantizers import learned_thresholds
from robustq.recipe import Recipe


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
