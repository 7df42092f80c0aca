"""Every QuantizeLinear and DequantizeLinear gets scale and zero point constants of its own.

Contract: no initializer is the scale or zero point of two nodes; values are unchanged. Why: with
``session.x64quantprecision`` onnxruntime rewrites 8-bit weights and their zero points in place, and refuses a file in
which two nodes share one (1.32: "Attempt to replace the existing tensor").
"""

from __future__ import annotations

import onnx

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

_PARAMETERS = {1: "scale", 2: "zero_point"}


def own_parameters(model: onnx.ModelProto) -> int:
    """Give shared parameters copies; returns how many copies were made."""
    graph = model.graph
    index = GraphIndex(graph)
    taken: set[str] = set()
    copies = 0
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, what in _PARAMETERS.items():
            name = node.input[place] if len(node.input) > place else ""
            values = index.constant(name)
            if values is None:
                continue
            if name in taken:
                node.input[place] = add_initializer(graph, f"{node.name}_{what}", values)
                copies += 1
            taken.add(name)
    drop_unused_initializers(graph)
    return copies
