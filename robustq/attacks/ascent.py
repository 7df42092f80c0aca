"""The gradient of an attack's loss with respect to the images, and the length of the steps along its sign."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon
from robustq.errors import UsageError

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) float in [0, 1] -> logits (N, K) float. An nn.Module is one."""


class Slope(NamedTuple):
    """What one forward and backward pass tells an attack; all detached.

    gradient: (N, C, H, W), of the loss of each image with respect to that image.
    losses: (N,), one per image.
    logits: (N, K).
    """

    gradient: Tensor
    losses: Tensor
    logits: Tensor


def input_gradient(model: Model, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Slope:
    """Differentiate `objective(model(x))` with respect to `x` only; works under `torch.no_grad` too.

    Parameters get no `.grad`. A NaN in the gradient becomes 0, that is no step there: it would turn the pixel into NaN,
    and a NaN image breaks every model without being an attack.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float.
        objective: logits (N, K) -> losses (N,), one per image.

    Raises:
        UsageError: the logits do not depend on the images for autograd, usually because the model runs outside PyTorch,
            under its own no_grad, or detaches its input. (A gradient that is merely zero is returned as it is.)
    """
    (slope,) = input_gradients(model, x, [objective])
    return slope


def input_gradients(model: Model, x: Tensor, objectives: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[Slope]:
    """The same for several objectives: one forward pass, and a backward pass for each as it is asked for.

    Args, result and errors are those of `input_gradient`.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = model(leaf)
    for number, objective in enumerate(objectives, 1):
        with torch.enable_grad():
            losses = objective(logits)
            total = losses.sum()
        gradient = None
        if total.requires_grad:
            goes_on = number < len(objectives)
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=goes_on)
        if gradient is None:
            raise UsageError(
                "the model gives logits without a gradient with respect to the images; attack its differentiable "
                "PyTorch form instead, and judge the images that this finds on the model itself"
            )
        yield Slope(torch.nan_to_num(gradient, nan=0.0), losses.detach(), logits.detach())


def step_length(step_size: float | None, *, epsilon: float, steps: int) -> float:
    """The step of an iterated attack, `epsilon / 4` if none is given; checks the three settings before any work.

    Raises:
        UsageError: epsilon outside [0, 1], a negative or NaN step, or fewer than one step.
    """
    check_epsilon(epsilon)
    if steps < 1:
        raise UsageError(f"steps is {steps}; an iterated attack takes at least 1")
    if step_size is None:
        return epsilon / 4
    if not 0.0 <= step_size <= 1.0:
        raise UsageError(f"step_size is {step_size}; give a number from 0 to 1, in the unit of the images, like 2/255")
    return step_size
