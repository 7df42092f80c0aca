"""Check that scales lie in the range of onnxruntime's kernels.

A limit is on the ratio r: the step of the values that enter a quantizer, divided by the quantizer's own step. The
limits are those of onnxruntime's kernels (MLAS, 1.32), which compute in float32:

- QLinearAdd subtracts both zero points as one float32 number, with an error of r * 5e-5 steps: at r = 2^15 the sum of
  two zeros gets another code. From r = 2^22 on, large sums overflow int32 before they are clipped.
- QLinearMul converts products to int32 before it clips them: 255 * 255 steps overflow just above r = 2^15.
- QLinearAveragePool does the same with 255 steps. QLinearGlobalAveragePool refuses ratios outside of [2^-32, 2^8) times
  the number of pixels.
- QLinearConv and QGemm are exact up to int32. The float kernels of an unoptimised file are not: the error of a float32
  sum of 2^32 steps is 256 steps, so that integers whose sum is 0 may get any code.

The limit of a sum is smaller than its kernel's: at r = 2^8 one step of an input exceeds all codes of the quantizer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, attributes
from robustq.export.lowering.requantize import MOVES
from robustq.export.lowering.short_names import module_name

LARGEST_RATIO = {"Add": 2.0**8, "Mul": 2.0**15, "AveragePool": 2.0**22}
"""Largest step of the operator's output, in steps of the quantizer behind it."""

GLOBAL_AVERAGE = (2.0**-32, 2.0**8)  # range of the same for a global average, divided by the number of pixels
LARGEST_SUM = 2.0**32  # of a layer, in steps of the quantizer behind it
LARGEST_CODE = 255
LAYERS = ("Conv", "Gemm")


def check_ranges(model: onnx.ModelProto) -> None:
    """Check all layers, sums, products and averages of a model in QCDQ form; ExportError where one is out of range."""
    index = GraphIndex(model.graph)
    for node in model.graph.node:
        if node.op_type in LAYERS:
            largest = _largest_sums(index, node).max(initial=0.0)
            if largest >= 2**31:
                raise ExportError(
                    f"{module_name(node.name)}: its sums can reach {largest:.1e}, and int32 holds 2.1e+09; give it "
                    "fewer inputs or smaller biases"
                )
        elif node.op_type == "QuantizeLinear" and index.constant(node.input[0]) is None:
            _check_quantizer(index, node)


def _check_quantizer(index: GraphIndex, quantizer: onnx.NodeProto) -> None:
    node, own = index.maker(quantizer, through=MOVES | {"Relu", "Clip"}), index.input(quantizer, 1)
    if node is None or own is None or own.size != 1:
        return
    steps = [_step(index, node, place) for place in range(2 if node.op_type in LAYERS else len(node.input))]
    if not steps or any(step is None for step in steps):
        return  # a function in float
    combine = np.maximum if node.op_type in ("Add", "Concat") else np.multiply
    ratios = functools.reduce(combine, [step for step in steps if step is not None]) / float(own.flat[0])
    if node.op_type in LAYERS:
        ratios = ratios * _largest_sums(index, node)
        low, high = 0.0, LARGEST_SUM
    elif node.op_type == "GlobalAveragePool":
        low, high = (limit * _pixels(index, node.input[0]) for limit in GLOBAL_AVERAGE)
    else:
        low, high = 0.0, LARGEST_RATIO.get(node.op_type, np.inf)
    ratio = float(ratios.max(initial=0.0))
    if not low <= ratio < high:
        what = "its largest sum" if node.op_type in LAYERS else "one step of what enters"
        raise ExportError(
            f"{module_name(node.name)}: {what} is {ratio:.1e} steps of the quantizer behind it, outside of the "
            f"[{low:.1e}, {high:.1e}) that can be computed; look for a huge weight or a variance near 0 in the "
            "BatchNorm before it, and train on with a smaller one"
        )


def _pixels(index: GraphIndex, name: str) -> int:
    """Height times width of a tensor (N, C, H, W); 1 where they are not known."""
    inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(index.graph)).graph
    shapes = [value.type.tensor_type.shape.dim for value in inferred.value_info if value.name == name]
    return max(int(np.prod([axis.dim_value for axis in shapes[0][2:]])), 1) if shapes else 1


def _step(index: GraphIndex, node: onnx.NodeProto, place: int) -> NDArray[np.float64] | None:
    """The scales (C,) or (1,) of dequantized values that ``node`` takes, through moves."""
    dequantizer = index.maker(node, place, through=MOVES)
    quantized = dequantizer is not None and dequantizer.op_type == "DequantizeLinear"
    scale = index.input(dequantizer, 1) if quantized else None
    return None if scale is None else scale.astype(np.float64).flatten()


def _codes(index: GraphIndex, layer: onnx.NodeProto, place: int) -> Any:
    """The constant codes of dequantized values that ``layer`` takes, in float64."""
    dequantizer = index.maker(layer, place)
    quantized = dequantizer is not None and dequantizer.op_type == "DequantizeLinear"
    codes = index.codes(dequantizer) if quantized else None
    return None if codes is None else codes.astype(np.float64)


def _largest_sums(index: GraphIndex, layer: onnx.NodeProto) -> NDArray[np.float64]:
    """Bounds of a layer's accumulators (C,); (0,) where it runs in float."""
    weight = _codes(index, layer, 1)
    if weight is None:
        return np.zeros(0)
    by_output = layer.op_type == "Conv" or attributes(layer).get("transB")
    rows = (weight if by_output else weight.T).reshape(weight.shape[0 if by_output else 1], -1)
    bias = _codes(index, layer, 2)
    sums: NDArray[np.float64] = np.abs(rows).sum(axis=1) * LARGEST_CODE + (0.0 if bias is None else np.abs(bias))
    return sums
