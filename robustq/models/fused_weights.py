"""Quantizers of weights, each as one function of autograd with its gradient in closed form.

A weight tensor is small, and what Brevitas' stock quantizers take is not arithmetic but the calls: dozens of tensor
operations a layer, forward and back (docs/results/training-cost.md). Values are the same, bit for bit, and so is what
exporters see: the modules are Brevitas' own, with another forward.

Shapes: weights w are (channels, ...), and every channel has a scale of its own, given back as (channels, 1, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor
from torch.autograd.function import once_differentiable


class _QuantizeToLargest(torch.autograd.Function):
    """round(w / s) * s with s = max |w| / largest code, differentiated straight through the rounding: with g what comes
    in for the values and h for the scale, g for w, and for the element that the maximum is, times its sign and over
    the largest code, the channel's sum of g (q - w / s) plus h. Nothing is clipped.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, largest_code: int, smallest: float) -> tuple[Tensor, Tensor]:
        flat = w.reshape(len(w), -1)
        largest, place = flat.abs().max(dim=1, keepdim=True)
        scale = largest.clamp_(min=smallest).div_(largest_code).reshape(_one_a_channel(w))
        # One float32 rounding may make a quotient a little more than the largest code, and it rounds to that.
        y = (w / scale).round_().mul_(scale)
        ctx.save_for_backward(w, y, scale, place)
        ctx.largest_code = largest_code
        return y, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        w, y, scale, place = ctx.saved_tensors
        g, of_scale = grads
        rounding = ((y - w) * g).reshape(len(w), -1).sum(dim=1, keepdim=True) / scale.reshape(len(w), 1)
        at_largest = (rounding + of_scale.reshape(len(w), 1)) / ctx.largest_code
        sign = w.reshape(len(w), -1).gather(1, place).sign()
        return g.reshape(len(w), -1).scatter_add(1, place, at_largest * sign).view(w.shape), None, None


class FusedWeightQuant(RescalingIntQuant):  # type: ignore[misc]
    """Brevitas' integer quantizer for symmetric weights whose scales follow the channels' largest magnitudes.

    Args:
        bit_width: width of the codes.
        scaling_min_val: smallest magnitude that a channel's largest weight counts as.
        others: as of ``RescalingIntQuant``.
    """

    def __init__(
        self,
        int_quant: Any,
        scaling_impl: Any,
        int_scaling_impl: Any,
        zero_point_impl: Any,
        bit_width_impl: Any,
        bit_width: int,
        scaling_min_val: float,
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.largest_code = 2 ** (bit_width - 1) - 1
        self.smallest = scaling_min_val

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights -> quantized weights of the same shape, their scales, zero point and bit width."""
        y, scale = _QuantizeToLargest.apply(x, self.largest_code, self.smallest)
        bit_width = self.msb_clamp_bit_width_impl()
        return y, scale, self.zero_point_impl(x, scale, bit_width), bit_width


class _SignTimesMean(torch.autograd.Function):
    """alpha sign(w) with alpha = mean |w| and +1 for the sign of 0; the gradient passes the sign as it is, and the
    mean: with g what comes in for the values and h for alpha, g + sign(w) (sum of g sign(w), plus h) / n, over the n
    weights of a channel, and 0 for the mean's part of a weight of 0.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
        alpha = w.reshape(len(w), -1).abs().mean(dim=1).clamp_(min=smallest).reshape(_one_a_channel(w))
        y = torch.where(w >= 0, alpha, -alpha)
        ctx.save_for_backward(w)
        return y, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        g, of_alpha = grads
        signed = torch.where(w >= 0, g, -g).reshape(len(w), -1)
        total = (signed.sum(dim=1).reshape(_one_a_channel(w)) + of_alpha) / signed.shape[1]
        return g + w.sign() * total, None


def scaled_signs(w: Tensor, *, smallest: float) -> tuple[Tensor, Tensor]:
    """Two-valued weights and their scales, of which none is below ``smallest``: see the module."""
    y, alpha = _SignTimesMean.apply(w, smallest)
    return y, alpha


def _one_a_channel(w: Tensor) -> tuple[int, ...]:
    return (len(w), *(1 for _ in w.shape[1:]))
