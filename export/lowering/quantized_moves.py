"""Operations that move or choose values between two quantized layers are wrapped in the same quantization again.

Contract: DequantizeLinear(s, z) - Flatten (or MaxPool) - Gemm (or Conv) becomes DequantizeLinear(s, z) - Flatten -
QuantizeLinear(s, z) - DequantizeLinear(s, z) - Gemm, for every output of a move and every link of a chain of them.
Requantizing codes to their own grid changes nothing; onnxruntime then moves codes and runs what follows as integers
instead of in float. Per-tensor scales only.
"""

from __future__ import annotations

import onnx
from onnx import helper

from robustq.export.lowering.graph import GraphIndex

MOVES = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Pad"})
"""Every value of their output is a value of their first input."""


def quantized_moves(model: onnx.ModelProto) -> int:
    """Wrap every such operation; returns how many outputs."""
    graph = model.graph
    wrapped = 0
    for node in list(graph.node):  # in order of execution, so that a chain is wrapped link by link
        if node.op_type not in MOVES:
            continue
        index = GraphIndex(graph)
        source = index.made_by.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        scale = index.constant(source.input[1])
        if scale is None or scale.size != 1:
            continue
        for moved in node.output:
            if all(consumer.op_type == "QuantizeLinear" for consumer in index.used_by[moved]):
                continue  # wrapped already, or not used
            _wrap(graph, index, node, moved, list(source.input[1:]))
            wrapped += 1
    return wrapped


def _wrap(graph: onnx.GraphProto, index: GraphIndex, node: onnx.NodeProto, moved: str, parameters: list[str]) -> None:
    codes, values = f"{moved}_codes", f"{moved}_values"
    for consumer in index.used_by[moved]:
        for place, name in enumerate(consumer.input):
            if name == moved:
                consumer.input[place] = values
    name = node.name if len(node.output) == 1 else f"{node.name}_{list(node.output).index(moved)}"
    position = list(graph.node).index(node) + 1
    graph.node.insert(
        position, helper.make_node("QuantizeLinear", [moved, *parameters], [codes], name=f"{name}_quantize")
    )
    graph.node.insert(
        position + 1, helper.make_node("DequantizeLinear", [codes, *parameters], [values], name=f"{name}_dequantize")
    )
