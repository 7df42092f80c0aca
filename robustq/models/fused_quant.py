"""Integer quantization of activations in few passes over memory, with its gradient in closed form.

Stock Brevitas writes the formula as some ten tensor operations, each of which autograd remembers and undoes by others;
in a small network that costs as much as the convolutions. Values are the same, bit for bit, and so is what exporters
and backward rules see: the module is Brevitas' own, with another forward.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor
from torch.autograd.function import once_differentiable

_HALVES = (torch.bfloat16, torch.float16)


class _Quantize(torch.autograd.Function):
    """clamp(round(x / s), low, high) * s, differentiated straight through: with q the code and g the gradient that
    comes in, g where round(x / s) is in range and 0 elsewhere for x; the sum of g (q - x / s) in range and of g q
    outside for s (arXiv:1902.08153, section 2.1, but that the range ends half a step further out). Rectified, with low
    = 0, it is the same of relu(x): nothing comes back up to x = 0.

    The arithmetic is in float32 for an x of fewer bits too; the answer then has x's type, as its gradient does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, rectified: bool) -> Tensor:
        y = (x.float().div_(scale) if x.dtype in _HALVES else x / scale).round_()
        y = y.clamp_(low, high).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, y, scale)
        # Half a step beyond the last codes, where rounding leaves the range.
        ctx.inside = (0.0 if rectified else low - 0.5, high + 0.5)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y, scale = ctx.saved_tensors
        low, high = ctx.inside
        g_x = _gradient_inside(grads[0], x, low * scale, high * scale)
        g_scale = None
        if ctx.needs_input_grad[1]:
            # The sum of g (q s - x) in range and g q s outside, divided by s: two dot products instead of a tensor.
            g_scale = (_dot(grads[0], y) - _dot(g_x, x)) / scale
        return g_x if ctx.needs_input_grad[0] else None, g_scale, None, None, None


def _gradient_inside(g: Tensor, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``g`` where x lies strictly between two scalars, 0 elsewhere (either for NaN); any shape, that of both."""
    inside = _inside_on_cpu if x.device.type == "cpu" and not torch.compiler.is_compiling() else _inside
    return inside(g, x, low, high)


def _inside(g: Tensor, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """It does not wait for the device."""
    return torch.where((x <= low) | (x >= high), torch.zeros((), device=g.device, dtype=g.dtype), g)


def _inside_on_cpu(g: Tensor, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The same in one pass over memory: it is how a hard tanh is differentiated."""
    result: Tensor = torch.ops.aten.hardtanh_backward(g, x, float(low), float(high))
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        # In the order in which it lies in memory, a reshape copies nothing.
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    if a.dtype in _HALVES and a.dim() > 1:
        # One sum an image, since a sum comes back in so few bits: rounding one of the whole tensor would lose what is
        # left when another one is subtracted from it. Converting both first would cost two more passes.
        return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(a), -1, 1)).sum(dtype=torch.float32)
    return torch.dot(a.reshape(-1), b.reshape(-1))


class FusedIntQuant(RescalingIntQuant):  # type: ignore[misc]
    """Brevitas' integer quantizer for one scale a tensor and zero point 0.

    Args:
        bit_width: width of the codes.
        signed: two's complement, or from 0 on.
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
        signed: bool,
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.codes = (-(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1) if signed else (0, 2**bit_width - 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> the quantized tensor of the same shape, its scale, zero point and bit width."""
        return self._quantized(x, rectified=False)

    def rectified(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of relu(x), for codes from 0 on, without that tensor."""
        return self._quantized(x, rectified=True)

    def _quantized(self, x: Tensor, *, rectified: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.int_scaling_impl(bit_width))
        zero_point = self.zero_point_impl(x, scale, bit_width)
        return _Quantize.apply(x, scale, *self.codes, rectified), scale, zero_point, bit_width
