"""Pass that keeps layers in float as they are written, between quantizers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from robustq.export.lowering.graph import GraphIndex, add_initializer, insert_nodes
from robustq.export.lowering.requantize import MOVES

LAYERS = frozenset({"ConvTranspose", "Softmax"})


def float_layers(model: onnx.ModelProto) -> int:
    """Put ``Max`` with the smallest float32, which changes no value, between a DequantizeLinear and each float layer of
    :data:`LAYERS`; returns how many.

    Between quantizers onnxruntime (1.32) rounds the weights of a ConvTranspose to 8 bits, and makes a QLinearSoftmax,
    whose exponentials are integers: some codes differ.
    """
    graph = model.graph
    index = GraphIndex(graph)
    lowest = np.array(np.finfo(np.float32).min, np.float32)
    kept = 0
    for node in list(graph.node):
        source = index.maker(node, through=MOVES)  # behind a move a pair of its own follows later
        if node.op_type not in LAYERS or source is None or source.op_type != "DequantizeLinear":
            continue
        bound = add_initializer(graph, f"{node.name}_lowest", lowest)
        values = f"{node.output[0]}_input"
        insert_nodes(graph, list(graph.node).index(node), [helper.make_node("Max", [node.input[0], bound], [values])])
        node.input[0] = values
        kept += 1
    return kept
