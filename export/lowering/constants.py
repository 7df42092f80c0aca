"""Constants of the graph.

Every QuantizeLinear, DequantizeLinear and Clip gets values, scale and zero point constants of its own.

Contract: no initializer is the same input of two such nodes; values are unchanged. A Clip's bounds stay shared. Why:
with ``session.x64quantprecision`` onnxruntime rewrites 8-bit weights and their zero points in place, and refuses a file
in which two nodes share one (1.32: "Attempt to replace the existing tensor"), weights behind a Clip as well. The
exporter shares zero points at 8 bits, and weights that happen to be equal, as those of one element are.

Sizes and amounts that depend on nothing become constants.

Contract: a node of :data:`FOLDABLE` whose inputs are all constants becomes an initializer with the value it would
compute; DequantizeLinear is none of these, so quantized weights and biases stay integers. Why: the exporter spells out
a padding's amounts in seven nodes, behind which no pass can see that they are fixed, derives zero points from one
another by Identity and Expand, and clips weights in range.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

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


FOLDABLE = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Expand",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Transpose",
        "Unsqueeze",
    }
)


def folded_constants(model: onnx.ModelProto, *, but: frozenset[str] = frozenset()) -> int:
    """Fold in order of execution, so that chains fold whole.

    Args:
        model: changed in place.
        but: operators of :data:`FOLDABLE` that stay.

    Returns:
        How many nodes went.
    """
    foldable = FOLDABLE - but
    graph = model.graph
    index = GraphIndex(graph)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in index.used_by}
    outputs = {output.name for output in graph.output}
    folded = 0
    for node in list(graph.node):
        inputs = [name for name in node.input if name]
        if node.op_type not in foldable or not all(name in known for name in inputs) or outputs & set(node.output):
            continue
        values = _run(model, node, {name: known[name] for name in inputs})
        known |= values
        graph.node.remove(node)
        for name, value in values.items():
            graph.initializer.append(numpy_helper.from_array(value, name))
        folded += 1
    drop_unused_initializers(graph)
    return folded


def _run(
    model: onnx.ModelProto, node: onnx.NodeProto, feeds: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    single = helper.make_model(helper.make_graph([node], "single", inputs, outputs), opset_imports=model.opset_import)
    results = ReferenceEvaluator(single).run(None, feeds)
    return dict(zip(node.output, map(np.asarray, results), strict=True))
