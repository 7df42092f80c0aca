"""Convolutions of integers for passes that train no weight (auxiliary passes, attacks); not those of exported files.

Weights and quantized activations lie on grids, so a convolution of them is a sum of integers times one scale a channel.
Processors with VNNI compute such sums exactly, three times as fast as a float32 convolution. The backward pass is in
bfloat16 where the processor has fast instructions for it: no code flips there. Measured: docs/results/training-cost.md.

The kernel is oneDNN's, under names that are no public interface: :func:`is_available` first compares a convolution.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from robustq.models.batch_norm import running_statistics
from robustq.models.quant.binary import FusedSign
from robustq.models.quant.folded_layers import ExactConv2d
from robustq.models.quant.shared_weights import replaced
from robustq.models.quant.straight_through import FusedIntQuant

LARGEST_CODE = 255  # of an input, less the lowest one: the kernel takes uint8 and int8


def _capabilities() -> Any:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def lacks_bfloat16() -> bool:
    """Whether the CPU would imitate products of bfloat16, slowly; False where nothing is known (other than x86)."""
    found = _capabilities()
    return bool(found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16")))


def slows_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 at half the pace of float32, by instructions of its own.

    So do Intel's cores whose pace lies in AMX, where virtual machines hide that. 16-bit floats of the other kind, which
    came with AMX, tell.
    """
    found = _capabilities()
    is_intel = str(found.get("cpu_name", "")).startswith("Intel")
    return is_intel and bool(found.get("avx512_fp16")) and not found.get("amx_bf16")


@cache
def is_available() -> bool:
    """Whether this CPU adds products of bytes up in 32 bits (VNNI), and torch has the kernel, which sums exactly."""
    if not (_capabilities().get("avx512_vnni") or _capabilities().get("avx_vnni")):
        return False
    codes = torch.full((1, 16, 4, 4), LARGEST_CODE, dtype=torch.uint8)
    weights = torch.full((16, 16, 3, 3), 127, dtype=torch.int8)
    weights[::2] = -127
    for zero_point in (0, 1):
        how = ([1, 1], [1, 1], [1, 1], 1)
        try:
            sums = convolve_codes(codes, torch.ones(()), weights, torch.ones(16), *how, zero_point)
        except (RuntimeError, AttributeError, TypeError):
            return False  # another torch, with other names or arguments
        if not torch.equal(sums.double(), functional.conv2d(codes.double() - zero_point, weights.double(), padding=1)):
            return False
    return True


class IntegerConvolutions:
    """Those convolutions of one network whose inputs are codes of at most 8 bits, or signs.

    Args:
        example: (N, C, H, W) images in [0, 1] for one forward pass that tells the input of each layer, in the mode that
            the network is in; nothing of it changes by that.
        way_back: type of gradients and weights in the backward pass; None: the fastest.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, way_back: torch.dtype | None = None) -> None:
        way_back = way_back or (torch.float32 if lacks_bfloat16() or slows_bfloat16() else torch.bfloat16)
        inputs = _input_quantizers(model, example)
        self._layers = [_Layer(conv, quantizer, way_back) for conv, quantizer in inputs if _is_fit(conv)]

    def __len__(self) -> int:
        return len(self._layers)

    def in_place(self) -> AbstractContextManager[None]:
        """Compute these convolutions in integers, in passes inside the `with` that ask for no gradient of a weight.

        Weights and scales must not change inside it.
        """
        return replaced(self._layers)


class _Layer:
    """Replaces the arithmetic of one convolution."""

    def __init__(self, conv: Any, quantizer: Any, way_back: torch.dtype) -> None:
        self._conv, self._quantizer, self._way_back = conv, quantizer, way_back
        self._codes: Any = None
        self._exact: Any = None

    @torch.no_grad()
    def begin(self) -> None:
        weight = self._conv.quant_weight()
        codes, weight_scale = (
            (weight.value / weight.scale).round_().to(torch.int8),
            weight.scale.reshape(-1).contiguous(),
        )
        scale = self._quantizer.current_scale()
        inverse = scale.reciprocal().clamp(max=torch.finfo(scale.dtype).max)  # finite, of 0 too
        if isinstance(self._conv, ExactConv2d) and self._conv.input_scale is not None:
            self._exact = [number.float().reshape(-1, 1, 1) for number in self._conv.bias_codes()]
            weight_scale = torch.ones_like(weight_scale)
        self._codes = (scale, inverse, codes, weight_scale)
        self._conv.inner_forward_impl = self

    def end(self) -> None:
        vars(self._conv).pop("inner_forward_impl", None)  # it hid the method of the class
        self._codes = self._exact = None

    def __call__(self, x: Any, weight: Any, bias: Any) -> Any:
        conv, values = self._conv, getattr(x, "value", x)
        if (conv.weight.requires_grad and torch.is_grad_enabled()) or values.dtype != torch.float32:
            return type(conv).inner_forward_impl(conv, x, weight, bias)
        geometry = (*(list(number) for number in (conv.stride, conv.padding, conv.dilation)), conv.groups)
        how = (geometry, -self._quantizer.codes[0], self._way_back)
        y = _Convolve.apply(values, getattr(weight, "value", weight), self._codes, self._exact, *how)
        return y if bias is None or self._exact is not None else y + getattr(bias, "value", bias).reshape(-1, 1, 1)


class _Convolve(torch.autograd.Function):
    """The convolution of scale * codes with weights; x gets the gradient of that, before which weights and the gradient
    that comes in are rounded to the type of the way back. Where exact, the bias is added as the device adds it, code by
    code (:mod:`robustq.models.quant.folded_layers`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        fixed: tuple[Tensor, Tensor, Tensor, Tensor],
        exact: list[Tensor] | None,
        geometry: tuple[Any, ...],
        zero_point: int,
        way_back: torch.dtype,
    ) -> Tensor:
        scale, inverse, weight_codes, weight_scale = fixed
        # Not divided, which takes longer: x is a code's multiple of the scale already, so that rounding finds it.
        codes = (x * inverse).round_()
        codes = (codes.add_(zero_point) if zero_point else codes).to(torch.uint8)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry, ctx.way_back = x.shape, geometry, way_back
        unit = scale if exact is None else torch.ones_like(scale)
        how = (*geometry, zero_point)
        sums = convolve_codes(codes, unit, weight_codes, weight_scale, *how)
        if exact is None:
            return sums
        steps, bias, step = exact
        return (sums * steps + bias) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        g = grads[0].to(ctx.way_back)
        # The input is only asked for its shape and its layout: where that is another than the gradient's, it is copied.
        # Compiled code forgets the layout that torch.empty is asked for (torch 2.15), but not the order of dimensions.
        images, channels, *size = ctx.shape
        shape = torch.empty((images, *size, channels), dtype=g.dtype, device=g.device).permute(0, 3, 1, 2)
        of_x, _, _ = torch.ops.aten.convolution_backward(
            *(g, shape, weight.to(g.dtype), None, stride, padding, dilation, False, [0, 0], groups),
            [True, False, False],
        )
        return (of_x.to(grads[0].dtype), *[None] * 6)


def convolve_codes(
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero_point: int = 0,
) -> Tensor:
    """The convolution of two tensors of codes, times their scales.

    Args:
        codes: (N, C, H, W) uint8, each ``zero_point`` more than its value; zeros are around it.
        scale: scalar float32, of one code.
        weight_codes: (K, C / groups, kh, kw) int8.
        weight_scale: (K,) float32.
        stride, padding, dilation, groups: of a convolution in two dimensions.

    Returns (N, K, H', W') float32, channels last: the exact sum of products, rounded once and again by the scales.
    """
    how = (stride, padding, dilation, groups, zero_point)
    answer: Tensor = torch.ops.robustq.convolve_codes(codes, scale, weight_codes, weight_scale, *how)
    return answer


_packed = WeakTensorKeyDictionary()
"""Weight codes -> settings of a convolution, and the kernel's form of the codes for them; a step's passes share it."""

_ZERO = torch.zeros(1, dtype=torch.int64)  # the zero point of weights


def _on_cpu(codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, *how: Any) -> Tensor:
    (stride, padding, dilation, groups, zero_point), one, onednn = how, float(scale), torch.ops.onednn
    packing = (one, zero_point, stride, padding, dilation, groups, list(codes.shape))
    settings = (packing, weight_codes._version)
    if weight_codes not in _packed or _packed[weight_codes][0] != settings:
        _packed[weight_codes] = (settings, onednn.qconv_prepack(weight_codes, weight_scale, *packing))
    _, packed = _packed[weight_codes]
    sums: Tensor = onednn.qconv_pointwise(
        *(codes.contiguous(memory_format=torch.channels_last), one, zero_point, packed, weight_scale, _ZERO, None),
        *(stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], ""),
    )
    return sums


def _shape_of(codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, *how: Any) -> Tensor:
    sizes = zip(codes.shape[2:], weight_codes.shape[2:], *how[:3], strict=True)
    size = [(x + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for x, kernel, step, pad, dilation in sizes]
    # Not its len, which would bind compiled code to this number of images.
    made = torch.empty(codes.shape[0], len(weight_codes), *size, device=codes.device)
    return made.contiguous(memory_format=torch.channels_last)


# Not torch.library.custom_op, whose first call loads torch's compiler: 1.4 seconds and 158 MB.
_Library: Any = torch.library.Library
_operators = _Library("robustq", "FRAGMENT")
_operators.define(
    "convolve_codes(Tensor codes, Tensor scale, Tensor weight_codes, Tensor weight_scale, "
    "int[] stride, int[] padding, int[] dilation, int groups, int zero_point) -> Tensor"
)
_operators.impl("convolve_codes", _on_cpu, "CPU")
_operators.impl("convolve_codes", _shape_of, "Meta")


def _input_quantizers(model: nn.Module, example: Tensor) -> list[tuple[Any, Any]]:
    """The convolutions whose inputs are codes that the kernel can take, each with the quantizer of its inputs."""
    made: dict[int, tuple[Any, Tensor, int]] = {}  # the tensor too: an id is only unique while that lives
    found: dict[Any, Any] = {}

    def remember(output: Any, quantizer: Any) -> None:
        tensor = getattr(output, "value", output)
        made[id(tensor)] = (quantizer, tensor, tensor._version)

    def maker(x: Any) -> Any:
        tensor = getattr(x, "value", x)
        quantizer, _, version = made.get(id(tensor), (None, None, None))
        return quantizer if tensor._version == version else None  # else written to since

    def quantized(layer: Any, _: Any, output: Any) -> None:
        quantizer = getattr(layer.act_quant.fused_activation_quant_proxy, "tensor_quant", None)
        if isinstance(quantizer, FusedSign | FusedIntQuant) and quantizer.codes[1] - quantizer.codes[0] <= LARGEST_CODE:
            remember(output, quantizer)

    def pooled(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        remember(output, maker(inputs[0]))  # the largest code of a few is a code

    def entered(conv: Any, inputs: tuple[Any, ...]) -> None:
        # A layer that is called twice may meet two grids.
        quantizer = maker(inputs[0])
        found[conv] = quantizer if found.get(conv, quantizer) is quantizer else None

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, qnn.QuantConv2d):
                stack.enter_context(module.register_forward_pre_hook(entered))
            elif isinstance(module, qnn.QuantReLU | qnn.QuantIdentity):
                stack.enter_context(module.register_forward_hook(quantized))
            elif isinstance(module, nn.MaxPool2d):
                stack.enter_context(module.register_forward_hook(pooled))
        # In the mode that it trains in: dropout hands the very tensor on when it is off, and other values when not.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        with torch.no_grad(), running_statistics(model):
            model(example)
    return [(conv, quantizer) for conv, quantizer in found.items() if quantizer is not None]


@torch.no_grad()
def _is_fit(conv: Any) -> bool:
    """Whether the kernel can take the weights: signed codes of at most 8 bits, one scale a channel, zeros around."""
    if not conv.weight_quant.is_quant_enabled or conv.input_quant.is_quant_enabled:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    weight = conv.quant_weight()
    signed_bytes = bool(weight.signed) and float(weight.bit_width) <= 8 and bool((weight.zero_point == 0).all())
    return signed_bytes and weight.scale.numel() == conv.out_channels
