"""Operations that move or choose values between two quantized layers are wrapped in the same quantization again.

Contract: DequantizeLinear(s, z) - Flatten (or MaxPool) - Gemm (or Conv) becomes DequantizeLinear(s, z) - Flatten -
QuantizeLinear(s, z) - DequantizeLinear(s, z) - Gemm. Requantizing codes to their own grid changes nothing; onnxruntime
then moves codes and runs what follows as integers instead of in float. Per-tensor scales only.
"""

from __future__ import annotations

import onnx
from onnx import helper

from robustq.export.lowering.graph import GraphIndex

MOVES = frozenset({"Flatten", "MaxPool"})
"""Every value of their output is a value of their input."""


def quantized_moves(model: onnx.ModelProto) -> int:
    """Wrap every such operation; returns how many."""
    graph = model.graph
    index = GraphIndex(graph)
    wrapped = 0
    for node in list(graph.node):
        source = index.made_by.get(node.input[0]) if node.op_type in MOVES else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        scale = index.constant(source.input[1])
        if scale is None or scale.size != 1:
            continue
        moved = node.output[0]
        if all(consumer.op_type == "QuantizeLinear" for consumer in index.used_by[moved]):
            continue  # wrapped already, or not used
        parameters = list(source.input[1:])
        codes, values = f"{moved}_codes", f"{moved}_values"
        for consumer in index.used_by[moved]:
            for place, name in enumerate(consumer.input):
                if name == moved:
                    consumer.input[place] = values
        position = list(graph.node).index(node) + 1
        graph.node.insert(
            position, helper.make_node("QuantizeLinear", [moved, *parameters], [codes], name=f"{node.name}_quantize")
        )
        graph.node.insert(
            position + 1,
            helper.make_node("DequantizeLinear", [codes, *parameters], [values], name=f"{node.name}_dequantize"),
        )
        wrapped += 1
    return wrapped
