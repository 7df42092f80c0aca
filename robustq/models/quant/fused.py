"""Quantizers as single autograd functions.

Integer quantization of activations in few passes over memory, with its gradient in closed form.

Stock Brevitas writes the formula as some ten tensor operations, each of which autograd remembers and undoes by others;
in a small network that costs as much as the convolutions. Values are the same, bit for bit, and so is what exporters
and backward rules see: the module is Brevitas' own, with another forward.

Quantizers of weights, each as one function of autograd with its gradient in closed form.

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


class _Quantize(torch.autograd.Function):
    """clamp(round(x / s), low, high) * s, differentiated straight through: with q the code and g the gradient that
    comes in, g where round(x / s) is in range and 0 elsewhere for x; the sum of g (q - x / s) in range and of g q
    outside for s (arXiv:1902.08153, section 2.1, but that the range ends half a step further out). Rectified, with low
    = 0, it is the same of relu(x): nothing comes back up to x = 0. An infinite x makes the gradient for s NaN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, rectified: bool) -> Tensor:
        y = x / scale
        y.round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.range = _range(low, high, rectified)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y, scale = ctx.saved_tensors
        low, high = ctx.range
        g_x = _inside(grads[0], x, low * scale, high * scale)
        g_scale = None
        if ctx.needs_input_grad[1]:
            # The sum of g (q s - x) in range and g q s outside, divided by s: two dot products instead of a tensor.
            g_scale = (_dot(grads[0], y) - _dot(g_x, x)) / scale
        return g_x if ctx.needs_input_grad[0] else None, g_scale, None, None, None


class _QuantizeHalf(torch.autograd.Function):
    """The same for x in bfloat16, computed in float32: what comes out and what comes back is rounded at the end.

    q s - x is taken before that. Two dot products of rounded numbers would leave little but rounding of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, rectified: bool) -> Tensor:
        exact = x.float()
        y = (exact / scale).round_().clamp_(low, high).mul_(scale)
        answer = y.to(x.dtype)
        ctx.range = _range(low, high, rectified)
        of_scale = None
        if ctx.needs_input_grad[1]:
            low_x, high_x = (bound * scale for bound in ctx.range)
            of_scale = y.sub_(_inside(exact, exact, low_x, high_x)).to(x.dtype)
        ctx.save_for_backward(x, scale, of_scale)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, of_scale = ctx.saved_tensors
        low, high = ctx.range
        g_x = _inside(grads[0], x, low * scale, high * scale) if ctx.needs_input_grad[0] else None
        g_scale = None if of_scale is None else _dot_of_halves(grads[0], of_scale) / scale
        return g_x, g_scale, None, None, None


def _range(low: int, high: int, rectified: bool) -> tuple[float, float]:
    """Half a step beyond the last codes, where rounding leaves the range; of a rectified one, 0."""
    return (0.0 if rectified else low - 0.5), high + 0.5


def _inside(g: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``g`` where x lies strictly between two scalars, 0 elsewhere (either for NaN); any shape, that of both."""
    if x.device.type != "cpu":
        return _inside_anywhere(g, x, low, high)
    if torch.compiler.is_compiling():
        return _inside_compiled_on_cpu(g, x, low, high)
    return _inside_on_cpu(g, x, low, high)


def _inside_anywhere(g: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """It does not wait for the device."""
    # With a dimension of their own, bounds are not rounded to the type of x.
    outside = (x <= low.reshape(1)) | (x >= high.reshape(1))
    return torch.where(outside, torch.zeros((), device=g.device, dtype=g.dtype), g)


def _inside_on_cpu(g: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same in one pass over memory: it is how a hard tanh is differentiated."""
    result: Tensor = torch.ops.aten.hardtanh_backward(g, x, float(low), float(high))
    return result


def _inside_compiled_on_cpu(g: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same without a truth value: torch.compile would keep those from the forward pass, since they are small, and
    its code for a CPU stores them one by one (torch 2.15: seventeen times the rest of such a pass,
    docs/results/training-cost.md). The sign of a difference of floats is exact; a gradient that is not finite stays so.
    """
    inside = torch.sign(x - low.reshape(1)).relu() * torch.sign(high.reshape(1) - x).relu()
    return g * inside.to(g.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return (a * b).sum()  # fused with what else is computed of them; a flattened one is addressed one by one
    a, b = _as_in_memory(a, b)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _dot_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """float32, of two tensors in bfloat16, without a copy of them."""
    if torch.compiler.is_compiling():
        return (a.float() * b.float()).sum()
    a, b = _as_in_memory(a, b)
    # One sum an image: each comes back rounded.
    images = len(a) if a.dim() > 1 else 1
    return torch.bmm(a.reshape(images, 1, -1), b.reshape(images, -1, 1)).sum(dtype=torch.float32)


def _as_in_memory(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two with their dimensions in the order in which they lie in memory, where a reshape copies nothing."""
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        return a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return a, b


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
        # What int_scaling_impl computes of the bit width: compiled code would do so for every few numbers of x.
        steps = torch.tensor(float(2 ** (bit_width - 1) if signed else 2**bit_width - 1))
        self.register_buffer("threshold_steps", steps, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> the quantized tensor of the same shape, its scale, zero point and bit width."""
        return self._quantized(x, rectified=False)

    def rectified(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of relu(x), for codes from 0 on, without that tensor."""
        return self._quantized(x, rectified=True)

    def _quantized(self, x: Tensor, *, rectified: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.threshold_steps)
        zero_point = self.zero_point_impl(x, scale, bit_width)
        quantize = _QuantizeHalf if x.dtype == torch.bfloat16 else _Quantize
        return quantize.apply(x, scale, *self.codes, rectified), scale, zero_point, bit_width


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
