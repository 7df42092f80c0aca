"""Every QuantizeLinear, DequantizeLinear and Clip gets values, scale and zero point constants of its own.

Contract: no initializer is the same input of two such nodes; values are unchanged. A Clip's bounds stay shared. Why:
with ``session.x64quantprecision`` onnxruntime rewrites 8-bit weights and their zero points in place, and refuses a file
in which two nodes share one (1.32: "Attempt to replace the existing tensor"), weights behind a Clip as well. The
exporter shares zero points at 8 bits, and weights that happen to be equal, as those of one element are.
"""

from __future__ import annotations

import onnx

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

_OWNED = {
    "QuantizeLinear": {1: "scale", 2: "zero_point"},
    "DequantizeLinear": {0: "values", 1: "scale", 2: "zero_point"},
    "Clip": {0: "values"},
}
"""Operator -> its inputs that are constants, by place."""


def own_constants(model: onnx.ModelProto) -> int:
    """Give shared constants copies; returns how many copies were made."""
    graph = model.graph
    index = GraphIndex(graph)
    taken: set[str] = set()
    copies = 0
    for node in graph.node:
        for place, what in _OWNED.get(node.op_type, {}).items():
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
