"""The pass that gives every Q and DQ node constants of its own."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx

from robustq.export.lowering.own_parameters import own_parameters
from tests.export import hand_made as hm


def sharing() -> onnx.ModelProto:
    """Two quantized tensors with the same scale and zero point, and a constant that nothing uses."""
    constants = {"s": np.float32(0.25), "z": np.uint8(7), "unused": np.ones(2, np.float32)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Neg", ["values"], "negated"),
        hm.quantize("negated", "codes2", "s", "z"),
        hm.dequantize("codes2", "y", "s", "z"),
    ]
    return hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})


def inputs() -> hm.Array:
    return np.linspace(-50, 50, 801, dtype=np.float32).reshape(1, -1)


def parameter_uses(model: onnx.ModelProto) -> Counter[str]:
    return Counter(
        name
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    )


def test_shared_parameters_are_copied() -> None:
    before, after = sharing(), sharing()
    assert own_parameters(after) == 3 * 2  # all but the first of four nodes, scale and zero point each
    onnx.checker.check_model(after, full_check=True)
    assert hm.counts(after) == hm.counts(before)
    uses = parameter_uses(after)
    assert len(uses) == 8 and set(uses.values()) == {1}
    for node in after.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert hm.constant(after, node.input[1]) == np.float32(0.25)
            assert hm.constant(after, node.input[2]) == 7 and hm.constant(after, node.input[2]).dtype == np.uint8
    assert hm.same_answers(before, after, inputs())


def test_names_stay_unique() -> None:
    model = sharing()
    model.graph.node[1].name = model.graph.node[3].name = model.graph.node[4].name = ""  # exporters need not name nodes
    before = copy.deepcopy(model)
    assert own_parameters(model) == 6
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names)) == 8
    assert hm.same_answers(before, model, inputs())


def test_unused_constants_go() -> None:
    model = sharing()
    own_parameters(model)
    assert "unused" not in {tensor.name for tensor in model.graph.initializer}


def test_a_second_run_does_nothing() -> None:
    model = sharing()
    own_parameters(model)
    once = model.SerializeToString()
    assert own_parameters(model) == 0
    assert model.SerializeToString() == once


def test_other_nodes_may_share() -> None:
    constants = {"one": np.float32(1.0)}
    nodes = [hm.node("Add", ["x", "one"], "mid"), hm.node("Mul", ["mid", "one"], "y")]
    model = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    assert own_parameters(model) == 0
    assert [tensor.name for tensor in model.graph.initializer] == ["one"]
