"""The optimiser of every method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from robustq.models.binary import binary_weights
from robustq.models.quantizers import learned_thresholds
from robustq.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum; weight decay on everything but learned activation thresholds and binary weights.

    The thresholds are logarithms: decay would pull every clipping range towards 1, whatever the activations are. What
    the size of binary weights says, BatchNorm takes out again; decay only makes every step flip more of their signs
    (docs/results/widths.md).
    """
    spared = [module.log_threshold for module in learned_thresholds(model).values()] + binary_weights(model)
    held = {id(parameter) for parameter in spared}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in held]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
