"""Layers in float: convolutions, products, normalisation, pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from robustq.errors import ModelFileError
from robustq.twin.registry import MICROSOFT, Call, check_size, check_work, common_shape, operator


def paddings(call: Call, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """ONNX' pads (begins, then ends) by attribute or by ``auto_pad``."""
    rank = len(kernel)
    mode = call.get("auto_pad", b"NOTSET").decode()
    if mode == "VALID":
        return [0] * (2 * rank)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
        ]
        smaller, larger = [one // 2 for one in totals], [one - one // 2 for one in totals]
        return smaller + larger if mode == "SAME_UPPER" else larger + smaller
    return list(call.get("pads", [0] * (2 * rank)))


def padded(call: Call, x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """Pad the last axes by ONNX' begins and ends."""
    rank = len(pads) // 2
    if not any(pads):
        return x
    check_size(
        call,
        [*x.shape[:-rank], *(s + a + b for s, a, b in zip(x.shape[-rank:], pads[:rank], pads[rank:], strict=True))],
    )
    order = [pads[place + end * rank] for place in reversed(range(rank)) for end in (0, 1)]
    return functional.pad(x, order, value=value)


def convolution(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with a node's attributes."""
    rank = w.dim() - 2
    if rank not in (1, 2) or x.dim() != w.dim():
        raise ModelFileError(f"{call.node} has {x.dim() - 2} spatial axes; 1 and 2 are supported")
    kernel = list(w.shape[2:])
    strides, dilations = list(call.get("strides", [1] * rank)), list(call.get("dilations", [1] * rank))
    pads = paddings(call, x, kernel, strides, dilations)
    if pads[:rank] == pads[rank:] and min(pads, default=0) >= 0:
        padding = pads[:rank]
    else:
        x, padding = padded(call, x, pads), [0] * rank
    sizes = [
        (size + 2 * more - dilation * (width - 1) - 1) // stride + 1
        for size, more, dilation, width, stride in zip(x.shape[2:], padding, dilations, kernel, strides, strict=True)
    ]
    check_work(call, [len(x), len(w), *sizes], math.prod(w.shape[1:]))
    convolve = functional.conv2d if rank == 2 else functional.conv1d
    y: Tensor = convolve(x, w, bias, strides, padding, dilations, call.get("group", 1))
    return y


@operator("Conv")
def conv(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Conv.html"""
    return convolution(call, x, w, bias)


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__ConvTranspose.html"""
    rank = w.dim() - 2
    if rank not in (1, 2) or x.dim() != w.dim():
        raise ModelFileError(f"{call.node} has {x.dim() - 2} spatial axes; 1 and 2 are supported")
    group, extra = call.get("group", 1), list(call.get("output_padding", [0] * rank))
    strides, dilations = list(call.get("strides", [1] * rank)), list(call.get("dilations", [1] * rank))
    sizes = [
        (size - 1) * stride + (width - 1) * dilation + 1 + more
        for size, stride, width, dilation, more in zip(x.shape[2:], strides, w.shape[2:], dilations, extra, strict=True)
    ]
    check_size(call, [len(x), w.shape[1] * group, *sizes])
    check_work(call, x.shape, math.prod(w.shape[1:]))
    mode, wanted = call.get("auto_pad", b"NOTSET").decode(), call.get("output_shape", None)
    pads = list(call.get("pads", [0] * (2 * rank)))
    if wanted is not None or mode.startswith("SAME"):
        wanted = wanted or [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        totals = [full - size for full, size in zip(sizes, wanted, strict=True)]
        smaller, larger = [one // 2 for one in totals], [one - one // 2 for one in totals]
        pads = smaller + larger if mode == "SAME_UPPER" else larger + smaller
    transposed = functional.conv_transpose2d if rank == 2 else functional.conv_transpose1d
    y: Tensor = transposed(x, w, None, strides, 0, 0, group, dilations)
    order = [(-pads[axis], extra[axis] - pads[rank + axis]) for axis in reversed(range(rank))]
    y = functional.pad(y, [one for pair in order for one in pair])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


@operator(MICROSOFT + "FusedConv")
def fused_conv(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """A convolution of onnxruntime with a sum and an activation function behind it."""
    y = convolution(call, x, w, bias)
    y = y if z is None else y + z
    kind = call.get("activation", b"").decode()
    parameters = call.get("activation_params", [])
    if kind in ("", "Relu"):
        return y.relu() if kind else y
    if kind == "LeakyRelu":
        return functional.leaky_relu(y, parameters[0])
    if kind == "Clip":
        return y.clamp(parameters[0], parameters[1])
    raise ModelFileError(f"{call.node} has the activation {kind}, which is not supported")


@operator("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Gemm.html"""
    a = a.mT if call.get("transA", 0) else a
    b = b.mT if call.get("transB", 0) else b
    y = product(call, a, b)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def product(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """A matrix product, its size and work checked."""
    if min(a.dim(), b.dim()) > 1:
        shape = [*common_shape(call, a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]
        check_size(call, shape)
        check_work(call, shape, a.shape[-1])
    return a @ b


@operator("MatMul")
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__MatMul.html"""
    return product(call, a, b)


@operator("BatchNormalization")
def batch_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__BatchNormalization.html"""
    if call.get("training_mode", 0):
        raise ModelFileError(f"{call.node} normalises by the batch (training mode); export the network in eval mode")
    return functional.batch_norm(x, mean, var, scale, bias, eps=call.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__LayerNormalization.html"""
    axis = call.get("axis", -1) % x.dim()
    shape = x.shape[axis:]
    if scale.shape != shape:
        scale, bias = scale.expand(shape), None if bias is None else bias.expand(shape)
    return functional.layer_norm(x, list(shape), scale, bias, eps=call.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__InstanceNormalization.html"""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@operator("LRN")
def local_response_normalization(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__LRN.html"""
    size = call.get("size", 1)
    check_work(call, x.shape, size)
    squares = x.square().unsqueeze(1)
    squares = functional.pad(squares, [0, 0, 0, 0, (size - 1) // 2, size - 1 - (size - 1) // 2])
    total = functional.avg_pool3d(squares, (size, 1, 1), stride=1).squeeze(1)  # divided by size, as the formula asks
    divisor: Tensor = (call.get("bias", 1.0) + call.get("alpha", 1e-4) * total) ** call.get("beta", 0.75)
    return x / divisor


def _window(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations and pads of a pooling, whose ends grow in ``ceil_mode``."""
    kernel = list(call.get("kernel_shape", []))
    if len(kernel) != x.dim() - 2 or x.dim() != 4:
        raise ModelFileError(f"{call.node} pools {x.dim() - 2} axes; 2 are supported")
    strides, dilations = list(call.get("strides", [1, 1])), list(call.get("dilations", [1, 1]))
    pads = paddings(call, x, kernel, strides, dilations)
    return kernel, strides, dilations, pads


def _extra(
    call: Call, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> list[int]:
    """Positions behind the padded image that windows of ``ceil_mode`` reach; windows begin inside image and pads."""
    if not call.get("ceil_mode", 0):
        return [0, 0]
    extra = []
    for place in range(2):
        size = x.shape[2 + place] + pads[place] + pads[2 + place]
        reach = dilations[place] * (kernel[place] - 1) + 1
        windows = -(-(size - reach) // strides[place]) + 1
        if (windows - 1) * strides[place] >= x.shape[2 + place] + pads[place]:
            windows -= 1
        extra.append(max((windows - 1) * strides[place] + reach - size, 0))
    return extra


def _windows(kernel: list[int], strides: list[int]) -> int:
    """How many windows hold a value, at most."""
    return math.prod(-(-width // stride) for width, stride in zip(kernel, strides, strict=True))


@operator("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__MaxPool.html"""
    if len(call.node.outputs) > 1 and call.node.outputs[1]:
        raise ModelFileError(f"{call.node} returns indices, which are not supported")
    kernel, strides, dilations, pads = _window(call, x)
    extra = _extra(call, x, kernel, strides, dilations, pads)
    x = padded(call, x, [pads[0], pads[1], pads[2] + extra[0], pads[3] + extra[1]], value=float("-inf"))
    check_work(call, x.shape, _windows(kernel, strides))
    return functional.max_pool2d(x, kernel, strides, 0, dilations)


@operator("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__AveragePool.html"""
    kernel, strides, dilations, pads = _window(call, x)
    if dilations != [1, 1]:
        raise ModelFileError(f"{call.node} is a dilated average, which is not supported")
    extra = _extra(call, x, kernel, strides, dilations, pads)
    counted = torch.ones_like(x[:1, :1])
    if call.get("count_include_pad", 0):
        counted = padded(call, counted, pads, value=1.0)
        counted = padded(call, counted, [0, 0, *extra])
    else:
        counted = padded(call, counted, [pads[0], pads[1], pads[2] + extra[0], pads[3] + extra[1]])
    x = padded(call, x, [pads[0], pads[1], pads[2] + extra[0], pads[3] + extra[1]])
    check_work(call, x.shape, _windows(kernel, strides))
    mean = functional.avg_pool2d(x, kernel, strides)
    if not any(pads) and not any(extra):
        return mean
    return mean / functional.avg_pool2d(counted, kernel, strides)


@operator("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__GlobalAveragePool.html"""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__GlobalMaxPool.html"""
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)
