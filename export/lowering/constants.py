"""Passes on constants: one for each node, and operators on constants computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

_OWNED = {
    "QuantizeLinear": {1: "scale", 2: "zero_point"},
    "DequantizeLinear": {0: "values", 1: "scale", 2: "zero_point"},
    "Clip": {0: "values"},
}
"""Operator -> place -> name of the inputs that get constants of their own."""


def own_constants(model: onnx.ModelProto) -> int:
    """Copy constants so that no two QuantizeLinear, DequantizeLinear or Clip nodes share values, scale or zero point;
    returns how many copies were made.

    With ``session.x64quantprecision`` onnxruntime rewrites 8-bit weights and their zero points in place, and refuses a
    file in which two nodes share one (1.32: "Attempt to replace the existing tensor"). The exporter shares zero points
    at 8 bits, and equal weights. Bounds of a Clip may stay shared.
    """
    graph = model.graph
    index = GraphIndex(graph)
    taken: set[str] = set()
    copies = 0
    for node in graph.node:
        for place, what in _OWNED.get(node.op_type, {}).items():
            values = index.input(node, place)
            if values is None:
                continue
            if node.input[place] in taken:
                node.input[place] = add_initializer(graph, f"{node.name}_{what}", values)
                copies += 1
            taken.add(node.input[place])
    drop_unused_initializers(graph)
    return copies


FOLDABLE = frozenset(
    {"Add", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Identity", "Reshape"}
    | {"Slice", "Transpose", "Unsqueeze"}
)


SMALL = 1024
"""Elements of a shape or of the amounts of a padding, with room to spare."""


def folded_constants(
    model: onnx.ModelProto, *, but: frozenset[str] = frozenset(), sizes: Mapping[str, int] | None = None
) -> int:
    """Replace nodes of :data:`FOLDABLE`, ``but`` some, whose inputs are constants by initializers; returns how many.

    In order of execution, so that a chain folds completely: the exporter writes a padding's amounts as seven nodes and
    derives zero points from one another. Quantized weights and biases stay integers, since DequantizeLinear is not
    foldable.

    Args:
        model: changed in place.
        but: operators that stay.
        sizes: elements of each tensor; if given, only nodes with outputs of up to :data:`SMALL` are replaced.
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
        if sizes is not None and any(sizes.get(name, SMALL + 1) > SMALL for name in node.output):
            continue
        values = _run(model, node, {name: known[name] for name in inputs})
        known |= values
        graph.node.remove(node)
        for name, value in values.items():
            graph.initializer.append(numpy_helper.from_array(value, name))
        folded += 1
    drop_unused_initializers(graph)
    return folded


def _run(model: onnx.ModelProto, node: onnx.NodeProto, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    single = helper.make_model(helper.make_graph([node], "single", inputs, outputs), opset_imports=model.opset_import)
    results = ReferenceEvaluator(single).run(None, feeds)
    return dict(zip(node.output, map(np.asarray, results), strict=True))
