"""A learned threshold with a largest value: the quantizer of ReLU6, which clips at 6 whatever it learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.models.quantizers import ActQuant, LearnedThreshold


class _AtMost(torch.autograd.Function):
    """min(value, largest) with the gradient of the identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, largest: float) -> Tensor:
        return value.clamp(max=largest)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class BoundedThreshold(LearnedThreshold):
    """:class:`LearnedThreshold` that is never above ``bound``.

    A rectifier that clips at ``bound`` followed by a quantizer that clips at a threshold up to ``bound`` is the
    quantizer alone, so a deployed file needs no clipping of its own between convolution and quantizer, which would keep
    onnxruntime from running the convolution as integers.

    Args:
        bit_width, signed: as :class:`LearnedThreshold`.
        bound: largest threshold, in the unit of the activations.
    """

    def __init__(self, bit_width: int, signed: bool, bound: float) -> None:
        super().__init__(bit_width, signed)
        self.bound = bound

    def limited(self, log_threshold: Tensor) -> Tensor:
        """At most the bound; above it the gradient goes on, so that training can come back."""
        return _AtMost.apply(log_threshold, math.log(self.bound))  # type: ignore[no-any-return]


class BoundedActQuant(ActQuant):
    """Unsigned activations after a rectifier that clips at ``bound``."""

    scaling_impl = BoundedThreshold  # type: ignore[assignment]
