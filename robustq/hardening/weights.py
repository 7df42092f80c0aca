"""A network's weights, taken out and put back without its quantizers noticing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def put_back(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into the very tensors of ``model``.

    ``model.load_state_dict`` will not do for a network in training: Brevitas then makes its quantizers anew, learned
    thresholds included (https://github.com/Xilinx/brevitas, ``REINIT_ON_STATE_DICT_LOAD``), and the optimiser would go
    on with the old ones, which nothing uses any more.

    Raises:
        KeyError, ValueError: names or shapes differ.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        raise KeyError(f"weights differ in {sorted(own.keys() ^ weights.keys())[0]}")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
        value.copy_(weights[name])


def taken_out(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights and running statistics of ``model``, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
