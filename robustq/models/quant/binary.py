"""One-bit quantizers (XNOR-Net, arXiv:1603.05279), and the thresholds that BatchNorm becomes in front of a sign.

Weights are alpha * sign(w) with alpha the mean magnitude of the output channel, activations sign(x); sign(0) is +1. The
paper's activation scale K, one number per position, is left out: no integer kernel can apply it, and Bi-Real Net
(arXiv:1808.00278) dropped it too. The gradient of an activation's sign is Bi-Real Net's.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import ClampedBinaryQuant
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType, StatsOp
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustq.models.quant.straight_through import per_channel


class _SignTimesMean(torch.autograd.Function):
    """alpha sign(w) with alpha = mean |w| and sign(0) = +1, differentiated straight through the sign and by the mean.

    With incoming gradients g for the values and h for alpha, over the n weights of a channel:
    g + sign(w) (sum of g sign(w), plus h) / n, where the second part is 0 for a weight of 0.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
        alpha = w.reshape(len(w), -1).abs().mean(dim=1).clamp_(min=smallest).reshape(per_channel(w))
        y = torch.where(w >= 0, alpha, -alpha)
        ctx.save_for_backward(w)
        return y, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        g, of_alpha = grads
        signed = torch.where(w >= 0, g, -g).reshape(len(w), -1)
        total = (signed.sum(dim=1).reshape(of_alpha.shape) + of_alpha) / signed.shape[1]
        return g + w.sign() * total, None


class StraightThroughBinaryQuant(nn.Module):
    """Brevitas' BinaryQuant, except that the gradient is not multiplied by the scale (`_SignTimesMean`)."""

    def __init__(self, scaling_impl: nn.Module, scaling_min_val: float) -> None:
        super().__init__()
        self.scaling_impl = scaling_impl
        self.smallest = scaling_min_val
        self.register_buffer("bit_width", torch.ones(()), persistent=False)
        self.register_buffer("zero_point", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
        """(C, ...) float -> +-scale of the same shape, the scales, zero point and bit width."""
        y, scale = _SignTimesMean.apply(x, self.smallest)
        return y, scale, self.zero_point, self.bit_width


class BinaryWeightQuant(WeightQuantSolver):  # type: ignore[misc]
    """alpha * sign(w), alpha the mean magnitude of the output channel (XNOR-Net, section 3.1).

    The gradient passes straight through to the weight, as at every other width, and through the mean. Two deviations
    from XNOR-Net: it multiplies the first part by alpha, with which SGD hardly moves (docs/results/widths.md), and by
    the indicator |w| <= 1, with which a weight beyond 1 could never come back.
    """

    tensor_quant = StraightThroughBinaryQuant
    bit_width = 1
    signed = True
    narrow_range = True
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.AVE
    scaling_min_val = 1e-10  # keeps the codes of a dead channel finite, as at the other widths
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class _Sign(torch.autograd.Function):
    """unit * sign(x), +1 at 0; backward multiplies by 2 - 2 |x| / unit, and by 0 beyond unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit = unit
        # A comparison that writes floats: torch.where between two numbers takes five times as long on a CPU.
        y = torch.empty_like(x)
        torch.ge(x, 0, out=y)
        return _affine(y, -unit, 2.0 * unit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        derivative = _affine(x.abs(), 2.0, -2.0 / ctx.unit)
        return derivative.clamp_(min=0.0).mul_(grads[0]), None


def _affine(y: Tensor, offset: float, factor: float) -> Tensor:
    """Add offset to factor * y, by one kernel; may overwrite y."""
    if y.device.type != "cpu":
        return torch.rsub(y, offset, alpha=-factor)
    # In place: on a CPU a new tensor takes as long again.
    return torch.add(torch.tensor(offset), y, alpha=factor, out=y)


class FusedSign(ClampedBinaryQuant):  # type: ignore[misc]
    """Brevitas' sign for activations in few passes over memory, with the gradient of a polynomial.

    The values are stock Brevitas'. Its gradient is that of a clip; ours is that of Bi-Real Net's surrogate, 2 x + x^2
    below 0 and 2 x - x^2 above (arXiv:1808.00278, section 3.3): 2 - 2 |x| within 1, 0 beyond (docs/results/widths.md).
    The scale is the constant ``scaling_init``.
    """

    codes = (-1, 1)

    def __init__(self, scaling_impl: nn.Module, scaling_init: float) -> None:
        super().__init__(scaling_impl)
        self.unit = scaling_init
        # The value of scaling_impl as a buffer: ConstScaling copies a number to the device in each forward.
        self.register_buffer("scale", torch.full((1,), float(scaling_init)), persistent=False)

    def current_scale(self) -> Tensor:
        """The scale of activations, a scalar."""
        return torch.tensor(self.unit)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> +-scale of the same shape, the scale, zero point and bit width."""
        return _Sign.apply(x, self.unit), self.scale.to(x.dtype), self.zero_point(), self.bit_width()


class BinaryActQuant(ActQuantSolver):  # type: ignore[misc]
    """sign(x), +1 at 0, with the gradient of ``FusedSign``."""

    tensor_quant = FusedSign
    bit_width = 1
    signed = True
    narrow_range = True
    scaling_impl_type = ScalingImplType.CONST
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP
    scaling_init = 1.0
    min_val = -1.0
    max_val = 1.0


SMALLEST_GAIN, LARGEST_GAIN = 1e-12, 1e12
"""Bounds of gain * scale, the change that one code makes in front of a sign."""


class SignNorm(nn.BatchNorm2d):
    """BatchNorm whose output only a sign reads."""


class ChannelThresholds(nn.Module):
    """gain * x - threshold per channel, with the sign of the BatchNorm that it replaces.

    The sign of gain * x + shift only depends on the side of a threshold that x lies on (FINN, arXiv:1612.07119, section
    4.2.2). For a quantized x the threshold is half-way between two codes, so that no rounding changes the sign. Gains
    are the BatchNorm's own, so that the sign's gradient is clipped at the same x; 0 in a channel of constant sign.
    """

    gain: Tensor
    threshold: Tensor
    step: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(channels, 1, 1))
        self.register_buffer("threshold", torch.zeros(channels, 1, 1))
        self.register_buffer("step", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) values of the quantized tensor -> the same shape; at least 0 where the sign is +1."""
        signed: Tensor = self.gain * getattr(x, "value", x) - self.threshold
        return signed

    @torch.no_grad()
    def set_affine(self, gain: Tensor, shift: Tensor, *, scale: float, lowest: int, highest: int) -> None:
        """Take the signs of gain * scale * code + shift for every code of the input from ``lowest`` to ``highest``.

        ``gain`` and ``shift`` are the BatchNorm's, (C,) float64 each.
        """
        codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
        positive = gain.reshape(-1, 1) * (codes * scale) + shift.reshape(-1, 1) >= 0  # monotone along the codes
        at_lowest, at_highest, count = positive[:, 0], positive[:, -1], positive.sum(dim=1)
        # The first positive code of a rising channel, or the last of a falling one, and half a code towards the others.
        boundary = torch.where(at_highest, highest + 1 - count - 0.5, lowest + count - 1 + 0.5) * scale
        # float32 must hold the gain and its products, or the sign is lost; the size matters only to the gradient.
        held = gain.sign() * gain.abs().clamp(min=SMALLEST_GAIN / scale, max=LARGEST_GAIN / scale)
        varies = at_lowest ^ at_highest
        constant = torch.where(at_lowest, -1.0, 1.0).double()
        self.gain.copy_(torch.where(varies, held, 0.0).reshape(-1, 1, 1))
        self.threshold.copy_(torch.where(varies, held * boundary, constant).reshape(-1, 1, 1))
        self.step.fill_(scale)

    def first_codes(self) -> tuple[Tensor, Tensor]:
        """The same signs as integer comparisons: x is on its channel's upper side from a code on.

        Returns (C,) int64 first code of the upper side, for a constant channel the lowest int64, and (C,) bool, whether
        the sign there is +1.
        """
        gain, threshold = self.gain.flatten().double(), self.threshold.flatten().double()
        varies = gain != 0
        boundary = threshold / torch.where(varies, gain, 1.0) / self.step.double()
        lowest = torch.iinfo(torch.int64).min
        first = torch.where(varies, (boundary + 0.5).round(), 0.0).long()
        return torch.where(varies, first, lowest), torch.where(varies, gain > 0, threshold < 0)
