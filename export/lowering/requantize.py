"""Passes that quantize values once more onto the grid that they are on already, which changes no value.

onnxruntime then moves codes instead of floats, and OpenVINO rounds the branches of a sum.
"""

from __future__ import annotations

import onnx
from onnx import helper

from robustq.export.lowering.graph import GraphIndex, insert_nodes, replace_input

MOVES = frozenset(
    {"Flatten", "MaxPool", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Pad", "Gather", "Resize"}
    | {"DepthToSpace", "SpaceToDepth", "ReduceMax", "ReduceMin"}
)
"""Operators that move or choose values: each value of the output is one of their first input."""

PASSED = frozenset({"Relu", "Clip"})
"""Operators allowed between a convolution and its quantizer, and between quantizer and dequantizer."""


def quantized_moves(model: onnx.ModelProto) -> int:
    """DequantizeLinear(s, z) - move becomes DequantizeLinear(s, z) - move - QuantizeLinear(s, z) - DequantizeLinear(s,
    z), for every output of a move and every link of a chain; returns how many outputs. A Concat of values with the same
    scale and zero point, and of zeros, is a move.

    Per-tensor scales only. onnxruntime leaves the layer behind a move in float otherwise.
    """
    graph = model.graph
    wrapped = 0
    index = GraphIndex(graph)
    for node in list(graph.node):  # in order of execution, so that a chain is wrapped link by link
        if node.op_type not in MOVES | {"Concat"}:
            continue
        source = index.maker(node) if node.op_type in MOVES else _common_source(index, node)
        if source is None or source.op_type != "DequantizeLinear":
            continue
        scale = index.input(source, 1)
        if scale is None or scale.size != 1:
            continue
        for number, moved in enumerate(node.output):
            readers = index.used_by[moved]
            if all(reader.op_type == "QuantizeLinear" for reader in readers):
                continue  # wrapped already, or not used
            name = node.name if len(node.output) == 1 else f"{node.name}_{number}"
            _requantize(
                graph, node, moved, source, readers, name=name, values=f"{moved}_values", codes=f"{moved}_codes"
            )
            wrapped += 1
            index = GraphIndex(graph)
    return wrapped


def _common_source(index: GraphIndex, concat: onnx.NodeProto) -> onnx.NodeProto | None:
    """A DequantizeLinear whose scale and zero point all parts of ``concat`` have, but for zeros."""
    sources = []
    for place, name in enumerate(concat.input):
        values, source = index.constant(name), index.maker(concat, place)
        if values is not None and not values.any():
            continue
        if source is None or source.op_type != "DequantizeLinear":
            return None
        sources.append(source)
    grids = {
        tuple(
            (one.dtype, float(one.flat[0]))
            for one in (index.input(source, 1), index.input(source, 2))
            if one is not None
        )
        for source in sources
    }
    return sources[0] if len(grids) == 1 else None


def rounded_sums(model: onnx.ModelProto) -> int:
    """Quantize once more what an Add takes from Conv - QuantizeLinear(s, z) - DequantizeLinear(s, z), z not 0, with or
    without Relu or Clip between them; returns how many branches.

    OpenVINO (2026.4; "drop rounding one special residual pattern" in its dnnl_postops_composer.cpp) fuses quantizer,
    sum and the next quantizer into the convolution and leaves out the rounding of the first, which moves about one code
    in fifty. With a second pair it fuses the first one only, and rounds. Where z is 0 it ignores the second pair; a
    pair of the other integer type would help, but tract (0.23.9) cannot load it. onnxruntime drops the second pair when
    it loads the file.
    """
    graph = model.graph
    index = GraphIndex(graph)
    doubled = 0
    for node in list(graph.node):
        zero_point = index.input(node, 2)
        if node.op_type != "DequantizeLinear" or zero_point is None or zero_point.size != 1 or not zero_point.any():
            continue
        sums = [reader for reader in index.used_by[node.output[0]] if reader.op_type == "Add"]
        quantizer = index.maker(node, through=PASSED)
        layer = index.maker(quantizer, through=PASSED)
        kinds = [one.op_type for one in (quantizer, layer) if one is not None]
        if sums and kinds == ["QuantizeLinear", "Conv"]:
            values = f"{node.output[0]}_again"
            name = f"{node.name}_again"
            _requantize(graph, node, node.output[0], node, sums, codes=f"{values}_codes", values=values, name=name)
            doubled += 1
    return doubled


def _requantize(
    graph: onnx.GraphProto,
    maker: onnx.NodeProto,
    tensor: str,
    dequantizer: onnx.NodeProto,
    readers: list[onnx.NodeProto],
    *,
    codes: str,
    values: str,
    name: str,
) -> None:
    """Put a pair with the grid of ``dequantizer`` between ``tensor``, an output of ``maker``, and ``readers``."""
    replace_input(readers, tensor, values)
    grid = dequantizer.input[1:]
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *grid], [codes], name=f"{name}_quantize"),
        helper.make_node("DequantizeLinear", [codes, *grid], [values], name=f"{name}_dequantize"),
    ]
    insert_nodes(graph, list(graph.node).index(maker) + 1, pair)
