"""Pass that leaves only signed bytes with zero point 0, which is all that TensorRT quantizes to."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from robustq.errors import ExportError
from robustq.export.lowering.constants import folded_constants
from robustq.export.lowering.graph import (
    GraphIndex,
    add_initializer,
    drop_unused_initializers,
    insert_nodes,
    replace_input,
)

LOWEST, HIGHEST = -128, 127


def symmetric_int8(model: onnx.ModelProto) -> tuple[int, int]:
    """Give every activation int8 codes with zero point 0, and biases float values; returns how many activations have
    such codes, and how many have none.

    A narrow width is a Clip of the float value in front of QuantizeLinear instead of one of the codes behind it: the
    bounds are codes times the scale, so that the same codes come out. Codes that exceed a signed byte (8 bits without
    sign: pixels, and activations behind a ReLU at 8 bits) become Div, Round, Clip, Mul in float. TensorRT reads
    QuantizeLinear of int8 with zero point 0 alone, and no DequantizeLinear of int32.

    Raises:
        ExportError: codes are read by another operator than Clip and DequantizeLinear, or scales are no scalars.
    """
    folded_constants(model)  # Clips of weights, which mark a width
    graph = model.graph
    _float_biases(graph)
    counts = [0, 0]
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear":
            counts[_rewritten(graph, node)] += 1
    drop_unused_initializers(graph)
    del graph.value_info[:]  # the element types written there no longer hold
    return counts[0], counts[1]


def _float_biases(graph: onnx.GraphProto) -> None:
    """DequantizeLinear of a constant int32 becomes its float value; per channel along the first axis."""
    index = GraphIndex(graph)
    for node in list(graph.node):
        codes, scale = index.input(node, 0), index.input(node, 1)
        if node.op_type != "DequantizeLinear" or codes is None or codes.dtype != np.int32 or scale is None:
            continue
        shaped = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.size > 1 else scale.reshape(())
        values = add_initializer(graph, f"{node.output[0]}_float", codes.astype(np.float32) * shaped)
        replace_input(index.used_by[node.output[0]], node.output[0], values)
        graph.node.remove(node)


def _rewritten(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Rewrite one QuantizeLinear with what reads it; 0 with codes of int8, 1 in float."""
    index = GraphIndex(graph)
    scale, zero = index.input(node, 1), index.input(node, 2)
    if scale is None or scale.size != 1 or (zero is not None and zero.size != 1):
        raise ExportError(f"{node.name}: its scale is no constant scalar; TensorRT's activations have one")
    kind = np.iinfo(np.uint8 if zero is None else zero.dtype)
    shift = 0 if zero is None else int(zero.reshape(()))
    low, high = int(kind.min), int(kind.max)
    readers = index.used_by[node.output[0]]
    clips = [one for one in readers if one.op_type == "Clip"]
    for clip in clips:
        bounds = [index.constant(name) if name else None for name in [*clip.input[1:], "", ""][:2]]
        low = max(low, low if bounds[0] is None else int(bounds[0].reshape(())))
        high = min(high, high if bounds[1] is None else int(bounds[1].reshape(())))
    if len(clips) > 1 or (clips and len(readers) > 1):
        raise ExportError(
            f"{node.name}: its codes are read in several ways; write it as qcdq without --target tensorrt"
        )
    dequantizers = index.used_by[clips[0].output[0]] if clips else readers
    if any(one.op_type != "DequantizeLinear" for one in dequantizers):
        raise ExportError(f"{node.name}: its codes are read by {dequantizers[0].op_type}, not by DequantizeLinear")
    step = np.float32(scale.reshape(()))
    low, high = low - shift, high - shift
    for clip in clips:
        graph.node.remove(clip)
    if low < LOWEST or high > HIGHEST:
        _in_float(graph, node, dequantizers, step, low, high)
        return 1
    if (low, high) != (LOWEST, HIGHEST):
        ends = [
            add_initializer(graph, f"{node.name}_{name}", np.array(end * step, np.float32))
            for name, end in (("low", low), ("high", high))
        ]
        clipped = f"{node.output[0]}_clipped"
        place = list(graph.node).index(node)
        insert_nodes(
            graph, place, [helper.make_node("Clip", [node.input[0], *ends], [clipped], name=f"{node.name}_clip")]
        )
        node.input[0] = clipped
    for one in (node, *dequantizers):
        none = add_initializer(graph, f"{one.name}_none", np.zeros((), np.int8))
        del one.input[2:]
        one.input.append(none)
    for one in dequantizers:
        one.input[0] = node.output[0]
    return 0


def _in_float(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    dequantizers: list[onnx.NodeProto],
    step: np.float32,
    low: int,
    high: int,
) -> None:
    """Div, Round, Clip, Mul in the place of a pair."""
    names = [f"{node.output[0]}_{name}" for name in ("steps", "rounded", "codes")]
    size, *ends = (
        add_initializer(graph, f"{node.name}_{name}", np.array(value, np.float32))
        for name, value in (("step", step), ("low", low), ("high", high))
    )
    nodes = [
        helper.make_node("Div", [node.input[0], size], [names[0]], name=f"{node.name}_div"),
        helper.make_node("Round", [names[0]], [names[1]], name=f"{node.name}_round"),
        helper.make_node("Clip", [names[1], *ends], [names[2]], name=f"{node.name}_clip"),
        *(helper.make_node("Mul", [names[2], size], [one.output[0]], name=f"{one.name}_mul") for one in dequantizers),
    ]
    place = list(graph.node).index(node)
    for one in (node, *dequantizers):
        graph.node.remove(one)
    insert_nodes(graph, place, nodes)
