"""Quantizers as single autograd functions: stock Brevitas' values bit for bit, gradients in closed form.

Stock Brevitas writes them as dozens of tensor operations, which cost as much as the convolutions of a small network
(docs/results/training-cost.md). The modules are subclasses of Brevitas' own with another forward, so that exporters and
backward rules find what they expect.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Quantize(torch.autograd.Function):
    """clamp(round(x / s), low, high) * s, differentiated straight through (arXiv:1902.08153, section 2.1).

    With code q and incoming gradient g: for x, g where round(x / s) is in range, else 0; for s, the sum of
    g (q - x / s) in range and of g q outside. The range ends half a step further out than in the paper. With ``relu``
    it is the same of relu(x), with gradient 0 up to x = 0. An infinite x makes the gradient for s NaN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, relu: bool) -> Tensor:
        y = x / scale
        y.round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.range = _range(low, high, relu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y, scale = ctx.saved_tensors
        low, high = ctx.range
        g_x = _inside(grads[0], x, scale, low, high)
        g_scale = None
        if ctx.needs_input_grad[1]:
            # The sum of g (q s - x) in range and g q s outside, divided by s: two dot products instead of a tensor.
            g_scale = (_dot(grads[0], y) - _dot(g_x, x)) / scale
        return g_x if ctx.needs_input_grad[0] else None, g_scale, None, None, None


class _QuantizeHalf(torch.autograd.Function):
    """The same for x in bfloat16, computed in float32; only results and gradients are rounded.

    The backward pass saves q s - x: the difference of two dot products of bfloat16 would be mostly rounding error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, relu: bool) -> Tensor:
        exact = x.float()
        y = (exact / scale).round_().clamp_(low, high).mul_(scale)
        answer = y.to(x.dtype)
        ctx.range = _range(low, high, relu)
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = y.sub_(_inside(exact, exact, scale, *ctx.range)).to(x.dtype)
        ctx.save_for_backward(x, scale, of_scale)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, of_scale = ctx.saved_tensors
        low, high = ctx.range
        g_x = _inside(grads[0], x, scale, low, high) if ctx.needs_input_grad[0] else None
        g_scale = None if of_scale is None else _dot_of_halves(grads[0], of_scale) / scale
        return g_x, g_scale, None, None, None


def _range(low: int, high: int, relu: bool) -> tuple[float, float]:
    """Half a step beyond the last codes, where rounding leaves the range; with a ReLU it begins at 0."""
    return (0.0 if relu else low - 0.5), high + 0.5


def _inside(g: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """``g`` where x lies strictly between low and high times a scalar, 0 elsewhere (either for NaN); g and x have one
    shape.
    """
    if x.device.type != "cpu":
        return _inside_anywhere(g, x, scale, low, high)
    return (_inside_compiled_on_cpu if torch.compiler.is_compiling() else _inside_on_cpu)(g, x, scale, low, high)


def _inside_anywhere(g: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """Without a synchronisation with the device: the host knows the bounds of x / scale, which the forward pass rounds.

    In two kernels; bounds on the device take seven.
    """
    quotient = x.float() / scale
    result: Tensor = torch.ops.aten.hardtanh_backward(g.float(), quotient, low, high)
    return result.to(g.dtype)


def _inside_on_cpu(g: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """In one pass over memory: the gradient of a hard tanh."""
    result: Tensor = torch.ops.aten.hardtanh_backward(g, x, float(low * scale), float(high * scale))
    return result


def _inside_compiled_on_cpu(g: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """Without a bool tensor: inductor saves it for the backward pass, and its CPU code stores bools one by one (torch
    2.15), 17 times as slow as the rest of the pass. Signs of float differences are exact; NaN and Inf stay.
    """
    # With a dimension of their own, bounds are not rounded to the type of x.
    inside = torch.sign(x - (low * scale).reshape(1)).relu() * torch.sign((high * scale).reshape(1) - x).relu()
    return g * inside.to(g.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return (a * b).sum()  # inductor fuses this, but reads flattened tensors element by element
    a, b = _in_memory_order(a, b)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _dot_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """The float32 dot product of two bfloat16 tensors, without copies of them."""
    if torch.compiler.is_compiling():
        return (a.float() * b.float()).sum()
    a, b = _in_memory_order(a, b)
    # One sum per image, since each is rounded to bfloat16.
    images = len(a) if a.dim() > 1 else 1
    return torch.bmm(a.reshape(images, 1, -1), b.reshape(images, -1, 1)).sum(dtype=torch.float32)


def _in_memory_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two with dimensions in memory order, so that a reshape copies nothing."""
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        return a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return a, b


class FusedIntQuant(RescalingIntQuant):  # type: ignore[misc]
    """Brevitas' integer quantizer for one scale per tensor, zero point 0, and signed codes or codes from 0 on."""

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
        self.codes = code_range(bit_width, signed=signed)
        # The value of int_scaling_impl as a buffer: compiled code would recompute it for every few elements of x.
        self.register_buffer("threshold_steps", torch.tensor(float(max(map(abs, self.codes)))), persistent=False)

    def current_scale(self) -> Tensor:
        """The scale of activations, a scalar."""
        scale: Tensor = self.scaling_impl(torch.zeros(()), self.threshold_steps)
        return scale

    def forward(self, x: Tensor, *, relu: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> the quantized tensor of the same shape, its scale, zero point and bit width.

        ``relu`` quantizes relu(x), by codes from 0 on, without a tensor for relu(x).
        """
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.threshold_steps)
        zero_point = self.zero_point_impl(x, scale, bit_width)
        quantize = _QuantizeHalf if x.dtype == torch.bfloat16 else _Quantize
        return quantize.apply(x, scale, *self.codes, relu), scale, zero_point, bit_width


class _CompiledReLU(torch.autograd.Function):
    """relu(x) for compiled code: saves no bool tensor for the backward pass (see ``_inside_compiled_on_cpu``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        g: Tensor = grads[0] * y.sign()
        return g


class FusedReLUQuant(nn.Module):
    """A ReLU and its quantizer as one function, in place of Brevitas' FusedActivationQuantProxy and with its names."""

    def __init__(self, activation_impl: nn.ReLU, tensor_quant: FusedIntQuant) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = tensor_quant

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> the quantized tensor of the same shape, its scale, zero point and bit width."""
        answer: tuple[Tensor, Tensor, Tensor, Tensor]
        hooked = _has_hooks(self.activation_impl) or _has_hooks(self.tensor_quant)
        if hooked or not isinstance(self.tensor_quant, FusedIntQuant):
            # A hook, as of a backward rule, needs two steps; so does a quantizer that Brevitas compiled.
            bare = torch.compiler.is_compiling() and not _has_hooks(self.activation_impl)
            answer = self.tensor_quant(_CompiledReLU.apply(x) if bare else self.activation_impl(x))
        else:
            answer = self.tensor_quant.forward(x, relu=True)
        return answer


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _QuantizeToLargest(torch.autograd.Function):
    """round(w / s) * s with s = max |w| / largest code, differentiated straight through the rounding; never clipped.

    With incoming gradients g for the values and h for the scale: g for w, and for the largest weight of a channel also
    its sign / largest code times (the channel's sum of g (q - w / s), plus h).
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, largest_code: int, smallest: float) -> tuple[Tensor, Tensor]:
        flat = w.reshape(len(w), -1)
        largest, place = flat.abs().max(dim=1, keepdim=True)
        scale = largest.clamp_(min=smallest).div_(largest_code).reshape(per_channel(w))
        # A quotient may exceed the largest code by one float32 rounding, and then rounds to that code.
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
    """Brevitas' integer quantizer for symmetric weights with scales from the channels' largest magnitudes.

    Magnitudes below ``scaling_min_val`` count as that.
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


def code_range(bit_width: int, *, signed: bool) -> tuple[int, int]:
    """The lowest and the highest integer of a width."""
    return (-(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1) if signed else (0, 2**bit_width - 1)


def per_channel(w: Tensor) -> tuple[int, ...]:
    """The shape of one number per channel of w (C, ...): (C, 1, ...)."""
    return (len(w), *(1 for _ in w.shape[1:]))
