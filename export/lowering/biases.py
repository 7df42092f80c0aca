"""Passes on the biases of layers: their scale, zero point and parameter shapes."""

from __future__ import annotations

import numpy as np
import onnx

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers


def accumulator_biases(model: onnx.ModelProto) -> int:
    """Give every bias the step of its layer's accumulator; returns how many layers changed.

    Where a Conv or Gemm has an int32 bias whose scale is 1/m of input scale * weight scale, m an integer, the weight
    codes are multiplied by m and their scale is divided by m, and the Clip that marked their width goes. The weights
    stay the same up to one float32 rounding. QLinearConv and QGemm add the bias to the accumulator without a look at
    its scale: where they differ, onnxruntime from 1.27 on leaves the layer in float, and older versions add a wrong
    bias. Folding makes biases of narrow weights finer (:func:`robustq.models.quant.folded_layers.bias_steps`).

    Raises:
        ExportError: m is no integer, or the weights would need more than 8 bits.
    """
    graph = model.graph
    index = GraphIndex(graph)
    changed = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        weight, bias = index.maker(node, 1), index.maker(node, 2)
        if any(one is None or one.op_type != "DequantizeLinear" for one in (weight, bias)):
            continue
        steps = _steps(index, node, weight, bias)
        if steps > 1:
            _multiply(index, node, weight, steps)
            changed += 1
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [one for one in graph.node if one.op_type == "Clip" and one.output[0] not in used]:
        graph.node.remove(node)
    drop_unused_initializers(graph)
    return changed


def _steps(index: GraphIndex, node: onnx.NodeProto, weight: onnx.NodeProto, bias: onnx.NodeProto) -> int:
    entering = index.maker(node)
    while entering is not None and entering.op_type != "DequantizeLinear":  # moves and choices of values
        entering = index.maker(entering)
    if entering is None:
        raise ExportError(f"{node.name}: its input is not quantized; the unit of its bias is not known")
    scales = [index.input(one, 1) for one in (entering, weight, bias)]
    if any(scale is None for scale in scales):
        raise ExportError(f"{node.name}: a scale is computed, not constant; the unit of its bias is not known")
    x_scale, w_scale, b_scale = (np.asarray(scale, dtype=np.float64) for scale in scales)
    ratio = x_scale * w_scale / b_scale
    steps = int(np.rint(ratio.flat[0]))
    # Scales are float32: a product of two and a quotient are right to some 2e-7.
    if steps < 1 or not np.allclose(ratio, steps, rtol=1e-5, atol=0.0):
        raise ExportError(
            f"{node.name}: its accumulator's step is {ratio.flat[0]:g} of its bias' steps, not an integer"
        )
    return steps


def _multiply(index: GraphIndex, node: onnx.NodeProto, weight: onnx.NodeProto, steps: int) -> None:
    codes, scale = index.codes(weight), index.input(weight, 1)
    if codes is None or codes.dtype != np.int8 or scale is None:
        raise ExportError(f"{node.name}: its weights are not constant int8 codes; cannot make its accumulator finer")
    multiplied = codes.astype(np.int32) * steps
    if np.abs(multiplied).max(initial=0) > 127:
        raise ExportError(f"{node.name}: weight codes times {steps} pass 127; cannot make its accumulator finer")
    weight.input[0] = add_initializer(index.graph, f"{node.name}_codes", multiplied.astype(np.int8))
    finer = (scale.astype(np.float64) / steps).astype(np.float32)
    weight.input[1] = add_initializer(index.graph, f"{node.name}_weight_scale", finer)


def implied_zero_points(model: onnx.ModelProto) -> int:
    """Drop the zero points of constant int32 codes that are all 0, the default of DequantizeLinear; returns how many.

    Per channel they take as many bytes as the biases. Weights keep theirs: with ``session.x64quantprecision``
    onnxruntime (1.32) makes a wrong one for 8-bit weights without, and the session fails at its first run.
    """
    graph = model.graph
    index = GraphIndex(graph)
    dropped = 0
    for node in graph.node:
        codes, zero_point = index.input(node, 0), index.input(node, 2)
        if node.op_type != "DequantizeLinear" or codes is None or codes.dtype != np.int32:
            continue
        if zero_point is not None and not zero_point.any():
            del node.input[2]
            dropped += 1
    drop_unused_initializers(graph)
    return dropped


def bias_zero_points(model: onnx.ModelProto) -> int:
    """Give scalar parameters of the Quant nodes of Conv biases the shape (1,); returns how many.

    FINN moves a bias behind its convolution and cannot reshape scalars (qonnx 1.0, ExtractBiasFromConv: "cannot reshape
    array of size 1").
    """
    graph = model.graph
    index = GraphIndex(graph)
    biases = {node.input[2] for node in graph.node if node.op_type == "Conv" and len(node.input) > 2}
    changed = 0
    for node in graph.node:
        if node.op_type != "Quant" or node.output[0] not in biases:
            continue
        for place, name in ((1, "scale"), (2, "zero_point")):
            value = index.constant(node.input[place])
            if value is not None and value.ndim == 0:  # a constant of its own: others may read the scalar
                node.input[place] = add_initializer(graph, f"{node.output[0]}_{name}", value.reshape(1))
                changed += 1
    drop_unused_initializers(graph)
    return changed
