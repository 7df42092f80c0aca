"""Reading and changing a graph."""

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
    values = index.constant("unused")
    assert values is not None and values.dtype == np.int8 and values.tolist() == [1, 2]
    assert index.constant("mid") is None and index.constant("x") is None and index.constant("") is None


def test_added_constants_get_free_names_and_unused_ones_go() -> None:
    graph = small().graph
    names = [add_initializer(graph, name, np.full((), 3.0)) for name in ("new", "new", "new", "mid")]
    assert names == ["new", "new_2", "new_3", "mid_2"]  # mid is the name of a computed tensor
    drop_unused_initializers(graph)
    assert [tensor.name for tensor in graph.initializer] == ["one"]
