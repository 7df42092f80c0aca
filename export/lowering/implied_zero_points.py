"""Zero points of biases are left to the operator's default.

Contract: the zero point of a DequantizeLinear of constant int32 codes goes where all its values are 0; ONNX defines it
as 0 then. Values are unchanged. Why: per channel they take as many bytes as the biases. Weights keep theirs, a byte a
channel: with ``session.x64quantprecision`` onnxruntime (1.32) makes a wrong one for 8-bit weights that have none, and
the session fails at its first run.
"""

from __future__ import annotations

import numpy as np
import onnx

from robustq.export.lowering.graph import GraphIndex, drop_unused_initializers


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
