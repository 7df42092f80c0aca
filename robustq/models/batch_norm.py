"""BatchNorm modes that a training step switches between, without a trace in the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with the statistics of the batch and leave the running ones alone, whatever mode the model is in."""
    norms = _norms(model)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        # In this combination torch takes the batch's statistics and neither reads nor updates the running ones.
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with the running statistics and leave them alone, whatever mode the model is in."""
    norms = _norms(model)
    before = [norm.training for norm in norms]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.training = training


@torch.no_grad()
def needs_two_images(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a training batch of one image fails: some BatchNorm sees a single value per channel of one image.

    Args:
        model: any network; its mode stays as it is.
        image_shape: (C, H, W).
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    smallest: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: smallest.append(inputs[0][0, 0].numel())) for layer in layers
    ]
    try:
        with running_statistics(model):
            model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return 1 in smallest
