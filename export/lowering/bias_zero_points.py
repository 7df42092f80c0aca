"""Bias quantizers have parameters of shape (1,) where Brevitas writes scalars.

Contract: each Quant node that makes the bias of a Conv has a scale and a zero point of shape (1,) or (C,); answers
stay, since both shapes broadcast alike. Why: FINN moves a bias behind its convolution and reshapes each parameter of
its quantizer to (1, C, 1, 1) unless the shape is (1,) (qonnx 1.0, ExtractBiasFromConv: "cannot reshape array of size
1").
"""

from __future__ import annotations

import onnx

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers


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
