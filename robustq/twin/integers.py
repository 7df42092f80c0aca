"""Layers that run on codes: ONNX' QLinearConv and its kind, and those that onnxruntime's quantizer writes.

Codes are float32 tensors. A sum of products of 8-bit codes is exact in them up to 2^24, which layers of image
classifiers hardly reach; above it the error is 2^-24 of the sum.
"""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from robustq.twin.gradients import to_codes
from robustq.twin.layers import average_pool, convolution, product
from robustq.twin.quantizers import along, codes_of, dequantized, of_levels, plain, quantized
from robustq.twin.registry import MICROSOFT, Call, common_shape, operator


def _shifted(codes: Tensor, zero_point: Tensor | None, axis: int = 1) -> Tensor:
    return codes if zero_point is None else codes - along(zero_point, codes, axis)


def _requantized(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None, kind_of: int) -> Tensor:
    """``scale`` times an exact sum, as codes of the type of input number ``kind_of``, the output's zero point."""
    kind = call.node.types[kind_of] if len(call.node.types) > kind_of else None
    lowest, highest = codes_of(call, kind or TensorProto.UINT8)
    codes = (max(call.get("lowest", lowest), lowest), min(call.get("highest", highest), highest))
    return of_levels(call, x * scale, 0.0 if zero_point is None else zero_point, plain(zero_point), codes)


@operator("QLinearConv")
def qlinear_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__QLinearConv.html"""
    total = convolution(call, _shifted(x, x_zero), _shifted(w, w_zero, axis=0), bias)
    return _requantized(call, total, along(x_scale * w_scale / y_scale, total, 1), y_zero, 7)


@operator("ConvInteger")
def conv_integer(
    call: Call, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__ConvInteger.html"""
    return convolution(call, _shifted(x, x_zero), _shifted(w, w_zero, axis=0), None)


@operator("QLinearMatMul")
def qlinear_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html"""
    total = product(call, _shifted(a, a_zero, axis=-2), _shifted(b, b_zero, axis=-1))
    scale = along(a_scale, total, -2) * along(b_scale, total, -1) / y_scale
    return _requantized(call, total, scale, y_zero, 7)


@operator("MatMulInteger")
def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__MatMulInteger.html"""
    return product(call, _shifted(a, a_zero, axis=-2), _shifted(b, b_zero, axis=-1))


@operator(MICROSOFT + "MatMulIntegerToFloat")
def matmul_integer_to_float(
    call: Call,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A product of codes as float numbers."""
    total: Tensor = matmul_integer(call, a, b, a_zero, b_zero)
    y = total * along(a_scale, total, -2) * along(b_scale, total, -1)
    return y if bias is None else y + bias


@operator(MICROSOFT + "QGemm")
def qgemm(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    bias: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
) -> Tensor:
    """Gemm of codes; float without an output scale. The bias counts in a_scale b_scale."""
    a, b = _shifted(a, a_zero), _shifted(b, b_zero, axis=0 if call.get("transB", 0) else 1)
    a, b = a.mT if call.get("transA", 0) else a, b.mT if call.get("transB", 0) else b
    total: Tensor = call.get("alpha", 1.0) * product(call, a, b)
    total = total if bias is None else total + bias
    scale = a_scale * b_scale
    return total * scale if y_scale is None else _requantized(call, total, scale / y_scale, y_zero, 8)


@operator(MICROSOFT + "QLinearAdd", MICROSOFT + "QLinearMul")
def qlinear_arithmetic(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Sum or product of codes of two scales."""
    common_shape(call, a.shape, b.shape)
    combine = torch.add if call.node.operator.endswith("Add") else torch.mul
    result = combine(dequantized(a, a_scale, a_zero), dequantized(b, b_scale, b_zero))
    kind = call.node.types[7] if zero_point is not None and len(call.node.types) > 7 else call.node.types[0]
    return quantized(call, result, scale, zero_point, codes_of(call, kind or TensorProto.UINT8))


def _unary(call: Call, y: Tensor, scale: Tensor, zero_point: Tensor | None, kind: int | None) -> Tensor:
    return quantized(call, y, scale, zero_point, codes_of(call, kind or TensorProto.UINT8))


@operator(MICROSOFT + "QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    """Mean over all positions."""
    axes = (1, 2) if call.get("channels_last", 0) else (2, 3)
    total = _shifted(x, x_zero).sum(dim=axes, keepdim=True)
    positions = x.shape[axes[0]] * x.shape[axes[1]]
    return _requantized(call, total, x_scale / (y_scale * positions), y_zero, 4)


@operator(MICROSOFT + "QLinearAveragePool")
def qlinear_average_pool(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    """Mean over a window. onnxruntime adds the zero point before it rounds."""
    levels = average_pool(call, dequantized(x, x_scale, x_zero)) / y_scale + y_zero
    lowest, highest = codes_of(call, call.node.types[0] or TensorProto.UINT8)
    return to_codes(levels, lowest=lowest, highest=highest, zero_point=plain(y_zero), rule=call.rule)


@operator(MICROSOFT + "QLinearSigmoid", MICROSOFT + "QLinearLeakyRelu")
def qlinear_activation(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    """An activation function between two scales."""
    values = dequantized(x, x_scale, x_zero)
    if call.node.operator.endswith("LeakyRelu"):
        y = functional.leaky_relu(values, call.get("alpha", 0.01))
    else:
        y = values.sigmoid()
    return _unary(call, y, y_scale, y_zero, call.node.types[0])


@operator(MICROSOFT + "QLinearSoftmax")
def qlinear_softmax(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    """Softmax between two scales."""
    y = dequantized(x, x_scale, x_zero).softmax(call.get("axis", -1))
    return _unary(call, y, y_scale, y_zero, call.node.types[0])


@operator(MICROSOFT + "QLinearConcat")
def qlinear_concat(call: Call, y_scale: Tensor, y_zero: Tensor, *parts: Tensor) -> Tensor:
    """Joined codes of several scales: (codes, scale, zero point) of each part."""
    kind = codes_of(call, call.node.types[1] or TensorProto.UINT8)
    thirds = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    values = [quantized(call, dequantized(*third), y_scale, y_zero, kind) for third in thirds]
    return torch.cat(values, dim=call.get("axis", 1))
