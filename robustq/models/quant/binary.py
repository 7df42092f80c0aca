"""Layers of 1 bit.

Quantizers of one bit, after XNOR-Net (arXiv:1603.05279).

Weights are alpha * sign(w) with alpha the mean magnitude of the output channel, activations sign(x); sign(0) is +1.
The paper's activation scale K, a mean over the input of every position, is left out: no integer kernel can run it, and
its successors dropped it (arXiv:1808.00278). From there comes the gradient of an activation's sign as well.

BatchNorm in front of a sign, and what is left of it in a folded network: one threshold per channel.

The sign of gain * x + shift only asks on which side of a threshold x lies (XNOR-Net's and FINN's folding,
arXiv:1612.07119 section 4.2.2). Where x is a quantized tensor the threshold lies half-way between two of its codes, so
that no rounding can move an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import BinaryQuant, ClampedBinaryQuant
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType, StatsOp
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustq.models.quant.fused import scaled_signs
from robustq.models.quant.quantizers import FixedScaling


class StraightThroughBinaryQuant(nn.Module):
    """Brevitas' BinaryQuant but for the gradient, which it multiplies by the scale.

    Args:
        scaling_impl: Brevitas' way to the scale, which computes the same.
        scaling_min_val: smallest scale.
    """

    def __init__(self, scaling_impl: nn.Module, scaling_min_val: float) -> None:
        super().__init__()
        self.scaling_impl = scaling_impl
        self.smallest = scaling_min_val
        self.register_buffer("bit_width", torch.ones(()), persistent=False)
        self.register_buffer("zero_point", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
        """Return the two-valued tensor, its scale, zero point and bit width, as every Brevitas tensor quantizer."""
        y, scale = scaled_signs(x, smallest=self.smallest)
        return y, scale, self.zero_point, self.bit_width


class BinaryWeightQuant(WeightQuantSolver):  # type: ignore[misc]
    """alpha * sign(w), alpha the mean magnitude of the output channel (XNOR-Net, section 3.1).

    The gradient passes straight through to the weight, as it does at every other width, and through the mean. XNOR-Net
    multiplies the first part by alpha, a tenth and less in these networks: Adam does not notice, SGD hardly moves then
    (docs/results/widths.md). Its indicator |w| <= 1 is left out: a weight that passed 1 could never come back.
    """

    tensor_quant = StraightThroughBinaryQuant
    bit_width = 1
    signed = True
    narrow_range = True
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.AVE
    scaling_min_val = 1e-10  # a dead channel's codes stay finite, as at the other widths
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class FoldedBinaryWeightQuant(WeightQuantSolver):  # type: ignore[misc]
    """The same signs with the per-channel scale held in a buffer (after BatchNorm was folded in)."""

    tensor_quant = BinaryQuant
    bit_width = 1
    signed = True
    narrow_range = True
    scaling_impl = FixedScaling
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class _Sign(torch.autograd.Function):
    """unit * sign(x), +1 at 0; the gradient is the one that comes in times (2 - 2 |x| / unit), and 0 beyond unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit = unit
        # A comparison that writes floats: torch.where between two numbers takes five times as long on a CPU.
        y = torch.empty_like(x)
        torch.ge(x, 0, out=y)
        return torch.add(torch.tensor(-unit), y, alpha=2.0 * unit, out=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        slope = x.abs()
        torch.add(torch.tensor(2.0), slope, alpha=-2.0 / ctx.unit, out=slope)
        return slope.clamp_(min=0.0).mul_(grads[0]), None


class FusedSign(ClampedBinaryQuant):  # type: ignore[misc]
    """Brevitas' sign for activations in few passes over memory, differentiated as a polynomial that resembles it.

    The values are those of stock Brevitas. Its gradient, 1 within the range and 0 beyond, is that of a clip; ours is
    that of the function which Bi-Real Net puts in a sign's place, 2 x + x^2 up to 0 and 2 x - x^2 from there on
    (arXiv:1808.00278, section 3.3): 2 - 2 |x| up to 1 and 0 beyond, for signs of +-1 (docs/results/widths.md).

    Args:
        scaling_impl: gives the scale, which is constant.
        scaling_init: that constant.
    """

    def __init__(self, scaling_impl: nn.Module, scaling_init: float) -> None:
        super().__init__(scaling_impl)
        self.unit = scaling_init

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> +-scale of the same shape, the scale, zero point and bit width."""
        return _Sign.apply(x, self.unit), self.scaling_impl(x), self.zero_point(), self.bit_width()


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
"""Bounds of gain * scale: of what one code adds in front of a sign."""


class SignNorm(nn.BatchNorm2d):
    """BatchNorm whose output meets nothing but a sign."""


class ChannelThresholds(nn.Module):
    """gain * x - threshold per channel, whose sign is that of the BatchNorm it replaces.

    Gains are the BatchNorm's own, so that the gradient which a sign cuts off at 1 is cut off where it was; 0 where a
    channel has one sign over all codes.

    Args:
        channels: C.
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
        value = getattr(x, "value", x)
        signed: Tensor = self.gain * value - self.threshold
        return signed

    @torch.no_grad()
    def set_affine(self, gain: Tensor, shift: Tensor, *, scale: float, lowest: int, highest: int) -> None:
        """Take the signs of gain * scale * code + shift for every code from ``lowest`` to ``highest``.

        Args:
            gain, shift: (C,) float64, of the BatchNorm.
            scale: of the quantized tensor that enters.
            lowest, highest: its codes.
        """
        codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
        positive = gain.reshape(-1, 1) * (codes * scale) + shift.reshape(-1, 1) >= 0  # monotone along the codes
        count = positive.sum(dim=1)
        rising, falling = positive[:, -1] & ~positive[:, 0], positive[:, 0] & ~positive[:, -1]
        first_positive = highest + 1 - count  # of a rising channel
        last_positive = lowest + count - 1  # of a falling one
        boundary = torch.where(rising, first_positive - 0.5, last_positive + 0.5) * scale
        # A gain that float32 or a product in it cannot hold would lose the sign; only its size is the gradient's.
        held = gain.sign() * gain.abs().clamp(min=SMALLEST_GAIN / scale, max=LARGEST_GAIN / scale)
        varies = rising | falling
        constant = torch.where(positive[:, 0], -1.0, 1.0).double()
        self.gain.copy_(torch.where(varies, held, 0.0).reshape(-1, 1, 1))
        self.threshold.copy_(torch.where(varies, held * boundary, constant).reshape(-1, 1, 1))
        self.step.fill_(scale)

    def first_codes(self) -> tuple[Tensor, Tensor]:
        """The same signs as comparisons of codes: x is on its channel's upper side from a code on.

        Returns:
            (C,) int64 first code of the upper side, and (C,) bool, whether the sign there is +1. A constant channel is
            on its upper side from the lowest int64 on.
        """
        gain, threshold = self.gain.flatten().double(), self.threshold.flatten().double()
        varies = gain != 0
        boundary = threshold / torch.where(varies, gain, 1.0) / self.step.double()
        lowest = torch.iinfo(torch.int64).min
        first = torch.where(varies, (boundary + 0.5).round(), 0.0).long()
        return torch.where(varies, first, lowest), torch.where(varies, gain > 0, threshold < 0)
