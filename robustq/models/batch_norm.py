"""BatchNorm layers of a network: modes for a single pass, and the convolutions that they follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with the statistics of the batch, in any mode of the model; running statistics stay as they are."""
    norms = _norms(model)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        # In this combination torch neither reads nor updates the running statistics.
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with the running statistics, in any mode of the model, without an update of them."""
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
    """Whether training fails on a batch of one image: some BatchNorm gets a single value per channel of an image.

    Args:
        model: any network; its mode is restored.
        image_shape: (C, H, W).
    """
    smallest: list[int] = []
    with ExitStack() as hooks:
        for norm in _norms(model):
            if isinstance(norm, nn.BatchNorm2d):
                hook = norm.register_forward_pre_hook(lambda _, inputs: smallest.append(inputs[0][0, 0].numel()))
                hooks.enter_context(hook)
        hooks.enter_context(running_statistics(model))
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    return 1 in smallest


@torch.no_grad()
def norm_inputs(model: nn.Module, example: Tensor) -> list[tuple[str, str | None]]:
    """The convolution whose output enters each BatchNorm, found by following the tensors of one forward pass.

    Args:
        model: any network; its mode and statistics are restored.
        example: (1, C, H, W) float32 in [0, 1], on the model's device.

    Returns:
        (name of the BatchNorm, name of the convolution) in the order of the calls; None for any other input.
    """
    made_by: dict[int, str] = {}
    keep: list[Tensor] = []  # an id is only unique while its tensor lives
    found: list[tuple[str, str | None]] = []

    def record_output(name: str, output: Tensor) -> None:
        keep.append(output)
        made_by[id(output)] = name

    def record_norm(name: str, inputs: tuple[Any, ...]) -> None:
        found.append((name, made_by.get(id(inputs[0]))))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_hook(lambda _, __, output, name=name: record_output(name, output))
                hooks.enter_context(hook)
            elif isinstance(module, _BatchNorm):
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda _, inputs, name=name: record_norm(name, inputs))
                )
        hooks.enter_context(running_statistics(model))
        model(example)
    return found
