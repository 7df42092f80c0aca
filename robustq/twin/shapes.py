"""Operators that move values: shapes, slices, joins, padding, reductions over axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustq.errors import ModelFileError
from robustq.twin.elementwise import is_integer
from robustq.twin.graph import array
from robustq.twin.registry import Call, check_size, common_shape, numbers, operator


def to_tensor(values: np.ndarray[Any, Any]) -> Tensor:
    """A constant: int64 as shapes and indices are, truth values and all others float32."""
    if values.dtype == np.int64:
        return torch.from_numpy(values.copy())
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())


def _axes(call: Call, x: Tensor, given: Tensor | None) -> list[int]:
    axes = call.get("axes", None) if given is None else numbers(given)
    return [] if axes is None else [int(one) % x.dim() for one in axes]


@operator("Constant")
def constant(call: Call) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Constant.html"""
    values = dict(call.node.attributes)
    if "value" in values:
        return to_tensor(array(values["value"]))
    for name, kind in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in values:
            return to_tensor(np.asarray(values[name], dtype=kind))
    raise ModelFileError(f"{call.node} holds a constant that is not supported ({', '.join(values)})")


@operator("ConstantOfShape")
def constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__ConstantOfShape.html"""
    check_size(call, numbers(shape))
    value = call.get("value", None)
    fill = torch.zeros(1) if value is None else to_tensor(array(value))
    return fill.reshape(()).expand(numbers(shape)).clone()


@operator("Shape")
def shape_of(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Shape.html"""
    return torch.tensor(x.shape[call.get("start", 0) : call.get("end", None)], dtype=torch.int64)


@operator("Size")
def size_of(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Size.html"""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape")
def reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Reshape.html"""
    wanted = list(call.get("shape", [])) if shape is None else numbers(shape)
    if not call.get("allowzero", 0):
        wanted = [x.shape[place] if size == 0 else size for place, size in enumerate(wanted)]
    if call.get("single", False) and wanted[:1] == [1] and len(x) != 1:
        wanted[0] = len(x)
    return x.reshape(wanted)


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Flatten.html"""
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis], dtype=object)), -1)


@operator("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Transpose.html"""
    return x.permute(call.get("perm", list(reversed(range(x.dim())))))


@operator("Concat")
def concat(call: Call, *parts: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Concat.html"""
    return torch.cat(parts, dim=call.get("axis", 0))


@operator("Squeeze")
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Squeeze.html"""
    wanted = _axes(call, x, axes) or [place for place, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(wanted))


@operator("Unsqueeze")
def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Unsqueeze.html"""
    places = call.get("axes", []) if axes is None else numbers(axes)
    rank = x.dim() + len(places)
    for place in sorted(one % rank for one in places):
        x = x.unsqueeze(place)
    return x


@operator("Slice")
def slice_of(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Slice.html"""
    first = call.get("starts", []) if starts is None else numbers(starts)
    last = call.get("ends", []) if ends is None else numbers(ends)
    places = _axes(call, x, axes) or list(range(len(first)))
    strides = [1] * len(first) if steps is None else numbers(steps)
    for place, start, end, stride in zip(places, first, last, strides, strict=True):
        # A negative end beyond the start is "before the first element" to ONNX, and None to Python.
        chosen = range(x.shape[place])[_slice(x.shape[place], start, end, stride)]
        index = torch.tensor(list(chosen), dtype=torch.int64, device=x.device)
        x = x.index_select(place, index) if stride != 1 else x.narrow(place, chosen.start, len(chosen))
    return x


def _slice(size: int, start: int, end: int, stride: int) -> slice:
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if stride > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), stride)
    return slice(min(max(start, 0), size - 1), None if end < 0 else min(end, size - 1), stride)


@operator("Gather")
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Gather.html"""
    axis = call.get("axis", 0) % x.dim()
    check_size(call, [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    flat = indices.long().reshape(-1).to(x.device)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("Split")
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """https://onnx.ai/onnx/operators/onnx__Split.html"""
    axis, count = call.get("axis", 0), len(call.node.outputs)
    wanted = call.get("split", None) if sizes is None else numbers(sizes)
    if wanted is None:
        size = -(-x.shape[axis] // count)
        wanted = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    return torch.split_with_sizes(x, list(wanted), dim=axis)


@operator("Expand")
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Expand.html"""
    return x.expand(common_shape(call, x.shape, numbers(shape)))


@operator("Tile")
def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Tile.html"""
    check_size(call, [size * times for size, times in zip(x.shape, numbers(repeats), strict=True)])
    return x.repeat(numbers(repeats))


@operator("Pad")
def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Pad.html"""
    amounts = list(call.get("pads", call.get("paddings", []))) if pads is None else numbers(pads)
    places = _axes(call, x, axes) or list(range(x.dim()))
    half = len(amounts) // 2
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for place, begin, end in zip(places, amounts[:half], amounts[half:], strict=True):
        begins[place], ends[place] = begin, end
    check_size(call, [max(size + a + b, 0) for size, a, b in zip(x.shape, begins, ends, strict=True)])
    mode = call.get("mode", b"constant").decode()
    fill = float(call.get("value", 0.0) if value is None else value)
    order = [one for place in reversed(range(x.dim())) for one in (begins[place], ends[place])]
    if mode == "constant":
        return functional.pad(x, order, value=fill)
    if mode in ("reflect", "edge") and x.dim() == 4 and not any(order[4:]):
        return functional.pad(x, order[:4], mode="reflect" if mode == "reflect" else "replicate")
    raise ModelFileError(f"{call.node} pads in mode {mode} along {places}, which is not supported")


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
def reduction(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__ReduceMean.html and its kind."""
    wanted = _axes(call, x, axes)
    if not wanted:
        if call.get("noop_with_empty_axes", 0):
            return x
        wanted = list(range(x.dim()))
    keep = bool(call.get("keepdims", 1))
    match call.node.operator:
        case "ReduceMean":
            return x.mean(dim=wanted, keepdim=keep)
        case "ReduceSum":
            return x.sum(dim=wanted, keepdim=keep)
        case "ReduceMax":
            return x.amax(dim=wanted, keepdim=keep)
        case "ReduceMin":
            return x.amin(dim=wanted, keepdim=keep)
    return x.square().sum(dim=wanted, keepdim=keep).sqrt()


@operator("Range")
def arange(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Range.html"""
    check_size(call, (max(0, int((float(limit) - float(start)) / float(delta)) + 1),))
    whole = is_integer(call, 0, start)
    values = torch.arange(start.item(), limit.item(), delta.item())
    return values.long() if whole else values.float()


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__DepthToSpace.html"""
    size = call.get("blocksize", 1)
    if call.get("mode", b"DCR").decode() == "CRD":
        return functional.pixel_shuffle(x, size)
    count, channels, height, width = x.shape
    y = x.reshape(count, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(count, channels // size**2, height * size, width * size)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__SpaceToDepth.html"""
    size = call.get("blocksize", 1)
    count, channels, height, width = x.shape
    y = x.reshape(count, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(count, channels * size**2, height // size, width // size)


@operator("Resize")
def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Resize.html: nearest, linear and cubic, in the forms that torch has too."""
    mode = call.get("mode", b"nearest").decode()
    coordinates = call.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = call.get("nearest_mode", b"round_prefer_floor").decode()
    if sizes is not None and sizes.numel():
        shape = numbers(sizes)
    elif scales is not None and scales.numel() == x.dim():
        shape = [int(size * float(scale)) for size, scale in zip(x.shape, scales, strict=True)]
    else:
        raise ModelFileError(f"{call.node} has neither sizes nor scales of all axes")
    check_size(call, shape)
    plain = x.dim() == 4 and shape[:2] == list(x.shape[:2]) and "axes" not in call.node.attributes
    if plain and mode == "nearest" and (coordinates, rounding) == ("asymmetric", "floor"):
        return functional.interpolate(x, size=shape[2:], mode="nearest")
    as_torch = mode == "linear" or (mode == "cubic" and abs(call.get("cubic_coeff_a", -0.75) + 0.75) < 1e-6)
    if plain and as_torch and coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        corners = coordinates == "align_corners"
        kind = "bilinear" if mode == "linear" else "bicubic"
        return functional.interpolate(x, size=shape[2:], mode=kind, align_corners=corners)
    raise ModelFileError(f"{call.node} resizes by {mode}, {coordinates}, {rounding}, which is not supported")
