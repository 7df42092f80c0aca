"""The optimiser of every method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from robustq.models.quantizers import learned_thresholds
from robustq.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum; weight decay on everything but learned activation thresholds.

    The thresholds are logarithms: decay would pull every clipping range towards 1, whatever the activations are.
    """
    thresholds = [module.log_threshold for module in learned_thresholds(model).values()]
    held = {id(parameter) for parameter in thresholds}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in held]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if thresholds:
        groups.append({"params": thresholds, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
