"""Zero points and parameters of bias quantizers.

Zero points of biases are left to the operator's default.

Contract: the zero point of a DequantizeLinear of constant int32 codes goes where all its values are 0; ONNX defines it
as 0 then. Values are unchanged. Why: per channel they take as many bytes as the biases. Weights keep theirs, a byte a
channel: with ``session.x64quantprecision`` onnxruntime (1.32) makes a wrong one for 8-bit weights that have none, and
the session fails at its first run.

Bias quantizers have parameters of shape (1,) where Brevitas writes scalars.

Contract: each Quant node that makes the bias of a Conv has a scale and a zero point of shape (1,) or (C,); answers
stay, since both shapes broadcast alike. Why: FINN moves a bias behind its convolution and reshapes each parameter of
its quantizer to (1, C, 1, 1) unless the shape is (1,) (qonnx 1.0, ExtractBiasFromConv: "cannot reshape array of size
1").
"""

from __future__ import annotations

import numpy as np
import onnx

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers


def implied_zero_points(model: onnx.ModelProto) -> int:
    """Drop every such zero point; returns how many."""
    graph = model.graph
    index = GraphIndex(graph)
    dropped = 0
    for node in graph.node:
        codes = index.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != np.int32 or len(node.input) < 3:
            continue
        zero_point = index.constant(node.input[2])
        if zero_point is not None and not zero_point.any():
            del node.input[2]
            dropped += 1
    drop_unused_initializers(graph)
    return dropped


def bias_zero_points(model: onnx.ModelProto) -> int:
    """Change the parameters of every such node; returns how many."""
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
