"""BatchNorm layers of a network: modes for a single pass, and the convolutions that they follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Normalise with the statistics of the batch, in any mode of the model; running statistics stay as they are."""
    # In this combination torch neither reads nor updates the running statistics.
    return _norms_with(model, training=True, track_running_stats=False)


def running_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Normalise with the running statistics, in any mode of the model, without an update of them."""
    return _norms_with(model, training=False)


@contextmanager
def _norms_with(model: nn.Module, **flags: bool) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [{name: getattr(norm, name) for name in flags} for norm in norms]
    for norm in norms:
        vars(norm).update(flags)
    try:
        yield
    finally:
        for norm, own in zip(norms, before, strict=True):
            vars(norm).update(own)


@torch.no_grad()
def needs_two_images(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether training fails on a batch of one image (C, H, W): some BatchNorm gets a single value per channel."""
    smallest: list[int] = []
    with ExitStack() as hooks:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
                hook = norm.register_forward_pre_hook(lambda _, inputs: smallest.append(inputs[0][0, 0].numel()))
                hooks.enter_context(hook)
        hooks.enter_context(running_statistics(model))
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    return 1 in smallest


@torch.no_grad()
def norm_inputs(model: nn.Module, example: Tensor) -> list[tuple[str, str | None]]:
    """The convolution whose output enters each BatchNorm, found by following the tensors of one forward pass.

    ``example`` is (1, C, H, W) float32 in [0, 1], on the model's device. Returns (name of the BatchNorm, name of the
    convolution) in the order of the calls; None for any other input.
    """
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    made_by: dict[int, tuple[str, Tensor]] = {}  # the tensor too: an id is only unique while that lives
    found: list[tuple[str, str | None]] = []

    def record_output(conv: nn.Module, _: Any, output: Tensor) -> None:
        made_by[id(output)] = (names[conv], output)

    def record_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append((names[norm], made_by.get(id(inputs[0]), (None,))[0]))

    with ExitStack() as hooks:
        for module in names:
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(record_output))
            elif isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(record_norm))
        hooks.enter_context(running_statistics(model))
        model(example)
    return found
