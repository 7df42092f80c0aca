"""Reading a graph: who makes a tensor, who uses it, what constant it is."""

from __future__ import annotations

import numpy as np
import onnx

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers
from tests.export import hand_made as hm


def small() -> onnx.ModelProto:
    constants = {"one": np.ones(1, np.float32), "unused": np.array([1, 2], np.int8)}
    nodes = [hm.node("Add", ["x", "one"], "mid"), hm.node("Mul", ["mid", "mid"], "y")]
    return hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})


def test_index() -> None:
    index = GraphIndex(small().graph)
    assert index.made_by["mid"].op_type == "Add" and "x" not in index.made_by and "one" not in index.made_by
    assert [node.op_type for node in index.used_by["mid"]] == ["Mul", "Mul"]
    assert (index.uses("mid"), index.uses("one"), index.uses("unused"), index.uses("nowhere")) == (2, 1, 0, 0)
    values = index.constant("unused")
    assert values is not None and values.dtype == np.int8 and values.tolist() == [1, 2]
    assert index.constant("mid") is None and index.constant("x") is None and index.constant("") is None


def test_added_constants_get_free_names() -> None:
    graph = small().graph
    assert add_initializer(graph, "new", np.full((), 3.0)) == "new"
    assert add_initializer(graph, "new", np.full((), 4.0)) == "new_2"
    assert add_initializer(graph, "new", np.full((), 5.0)) == "new_3"
    assert add_initializer(graph, "mid", np.full((), 6.0)) == "mid_2"  # the name of a computed tensor
    values = {tensor.name: onnx.numpy_helper.to_array(tensor).item() for tensor in graph.initializer[2:]}
    assert values == {"new": 3, "new_2": 4, "new_3": 5, "mid_2": 6}


def test_only_unused_constants_are_dropped() -> None:
    graph = small().graph
    drop_unused_initializers(graph)
    assert [tensor.name for tensor in graph.initializer] == ["one"]
