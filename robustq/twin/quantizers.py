"""Quantizers: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, and QONNX' Quant, BipolarQuant and Trunc."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from robustq.errors import ModelFileError
from robustq.twin.gradients import rounded, step, to_codes
from robustq.twin.registry import MICROSOFT, QONNX, Call, operator

CODES: dict[int, tuple[float, float]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.INT32: (-(2.0**31), 2.0**31 - 1),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
}
"""ONNX element type -> lowest and highest code."""
CODES |= {
    getattr(TensorProto, name): codes
    for name, codes in (("UINT2", (0, 3)), ("INT2", (-2, 1)))
    if hasattr(TensorProto, name)
}


def codes_of(call: Call, kind: int | None) -> tuple[float, float]:
    """Lowest and highest code of an element type.

    Raises:
        ModelFileError: not an integer type of quantizers, such as float8.
    """
    if kind not in CODES:
        raise ModelFileError(f"{call.node} has codes of a type that is not supported ({kind})")
    return CODES[kind]


def along(values: Tensor, x: Tensor, axis: int, block: int = 0) -> Tensor:
    """Scales or zero points of one axis of x, in a shape that broadcasts with x; of blocks, repeated."""
    if block:
        return values.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    if values.dim() != 1 or values.numel() == 1:
        return values.reshape(()) if values.numel() == 1 else values
    shape = [1] * x.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)


def plain(zero_point: Tensor | None) -> Tensor | float:
    """A zero point as a number where it is one for all."""
    if zero_point is None:
        return 0.0
    first = zero_point.reshape(-1)[:1]
    return float(first) if bool((zero_point == first).all()) else zero_point


def quantized(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None, codes: tuple[float, float], axis: int = 1
) -> Tensor:
    """Codes of activations."""
    scale = along(scale, x, axis)
    zero = 0.0 if zero_point is None else along(zero_point, x, axis)
    single = plain(zero_point)
    return of_levels(call, x / scale, zero, single, codes)


def of_levels(
    call: Call, levels: Tensor, zero: Tensor | float, single: Tensor | float, codes: tuple[float, float]
) -> Tensor:
    """Codes of activations in units of the scale, which are rounded before the zero point is added, as ONNX says.

    Args:
        zero, single: the zero point, as it broadcasts with the levels, and as :func:`plain` has it.
    """
    whole = levels.detach().round() + zero
    return to_codes(levels + zero, lowest=codes[0], highest=codes[1], zero_point=single, rule=call.rule, whole=whole)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int = 1) -> Tensor:
    """Values of codes."""
    scale = along(scale, codes, axis)
    return codes * scale if zero_point is None else (codes - along(zero_point, codes, axis)) * scale


@operator("QuantizeLinear", MICROSOFT + "QuantizeLinear")
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html"""
    kind = call.node.types[2] if zero_point is not None and len(call.node.types) > 2 else None
    codes = codes_of(call, kind or call.get("output_dtype", 0) or TensorProto.UINT8)
    lowest, highest = call.get("lowest", codes[0]), call.get("highest", codes[1])
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    if block:
        scale = along(scale, x, axis, block)
        zero_point = None if zero_point is None else along(zero_point, x, axis, block)
    return quantized(call, x, scale, zero_point, (max(lowest, codes[0]), min(highest, codes[1])), axis)


@operator("DequantizeLinear", MICROSOFT + "DequantizeLinear")
def dequantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    if block:
        scale = along(scale, x, axis, block)
        zero_point = None if zero_point is None else along(zero_point, x, axis, block)
    return dequantized(x, scale, zero_point, axis)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html

    The scale is of each image alone, as if the file were called with one image at a time. It counts as a constant in
    the gradient.
    """
    with torch.no_grad():
        own = tuple(range(1, x.dim()))
        low, high = x.amin(dim=own, keepdim=True).clamp(max=0.0), x.amax(dim=own, keepdim=True).clamp(min=0.0)
        scale = (high - low) / 255.0
        scale = torch.where(scale == 0.0, torch.ones_like(scale), scale)
        zero_point = (-low / scale).round().clamp(0.0, 255.0)
    return of_levels(call, x / scale, zero_point, zero_point, (0.0, 255.0)), scale, zero_point


@operator(QONNX + "Quant", QONNX + "IntQuant", "onnx.brevitas.Quant")
def quant(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor) -> Tensor:
    """https://github.com/fastmachinelearning/qonnx/blob/main/docs/qonnx-custom-ops/quant_op.md

    The width is one number for all channels.
    """
    mode = call.get("rounding_mode", b"ROUND")
    if (mode.decode() if isinstance(mode, bytes) else mode).upper() != "ROUND":
        raise ModelFileError(f"{call.node} rounds by {mode!r}, only ROUND is supported")
    bits = plain(bit_width)
    if isinstance(bits, Tensor):
        raise ModelFileError(f"{call.node} has a bit width for each channel, which is not supported")
    signed, narrow = bool(call.get("signed", 1)), bool(call.get("narrow", 0))
    lowest = -(2.0 ** (bits - 1)) + narrow if signed else 0.0
    highest = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
    codes = to_codes(
        x / scale + zero_point, lowest=lowest, highest=highest, zero_point=plain(zero_point), rule=call.rule
    )
    return (codes - zero_point) * scale


@operator(QONNX + "BipolarQuant")
def bipolar_quant(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """https://github.com/fastmachinelearning/qonnx/blob/main/docs/qonnx-custom-ops/bipolar_quant_op.md"""
    above = (x >= 0).to(x.dtype)
    return scale * (2.0 * step(x, above, call.rule) - 1.0)


@operator(QONNX + "Trunc")
def trunc(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, in_bits: Tensor, *rest: Tensor) -> Tensor:
    """https://github.com/fastmachinelearning/qonnx/blob/main/docs/qonnx-custom-ops/trunc_op.md (version 1)"""
    if len(rest) != 1:
        raise ModelFileError(f"{call.node} is of a later version of Trunc, which is not supported")
    mode = call.get("rounding_mode", b"FLOOR")
    round_by = {"FLOOR": torch.floor, "ROUND": torch.round, "CEIL": torch.ceil}.get(mode.decode().upper())
    if round_by is None:
        raise ModelFileError(f"{call.node} rounds by {mode!r}, which is not supported")
    codes = x / scale + zero_point
    codes = rounded(codes, codes.round())
    narrower = codes / 2.0 ** float(in_bits - rest[0])
    return (rounded(narrower, round_by(narrower)) - zero_point) * scale
