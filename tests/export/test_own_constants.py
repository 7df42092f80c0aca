"""The pass that gives every Q and DQ node constants of its own."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx

from robustq.export.lowering.constants import own_constants
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
    assert own_constants(after) == 3 * 2  # all but the first of four nodes, scale and zero point each
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
    assert own_constants(model) == 6
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names)) == 8
    assert hm.same_answers(before, model, inputs())


def test_unused_constants_go() -> None:
    model = sharing()
    own_constants(model)
    assert "unused" not in {tensor.name for tensor in model.graph.initializer}


def test_a_second_run_does_nothing() -> None:
    model = sharing()
    own_constants(model)
    once = model.SerializeToString()
    assert own_constants(model) == 0
    assert model.SerializeToString() == once


def test_other_nodes_may_share() -> None:
    constants = {"one": np.float32(1.0)}
    nodes = [hm.node("Add", ["x", "one"], "mid"), hm.node("Mul", ["mid", "one"], "y")]
    model = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    assert own_constants(model) == 0
    assert [tensor.name for tensor in model.graph.initializer] == ["one"]


def sharing_weights() -> onnx.ModelProto:
    """Two 8-bit layers with the same weights, clipped as QCDQ clips them."""
    constants = {
        **{"w": np.array([[3, -2], [1, 5]], np.int8), "low": np.int8(-127), "high": np.int8(127)},
        **{"s": np.float32(0.25), "z": np.int8(0)},
    }
    nodes = [
        hm.node("Clip", ["w", "low", "high"], "clipped1"),
        hm.dequantize("clipped1", "weights1", "s", "z"),
        hm.node("MatMul", ["x", "weights1"], "mid"),
        hm.node("Clip", ["w", "low", "high"], "clipped2"),
        hm.dequantize("clipped2", "weights2", "s", "z"),
        hm.node("MatMul", ["mid", "weights2"], "behind"),
        hm.dequantize("w", "weights3", "s", "z"),
        hm.node("MatMul", ["behind", "weights3"], "y"),
    ]
    return hm.model(nodes, constants, x=["n", 2], outputs={"y": 2})


def test_shared_weights_are_copied_and_bounds_are_not() -> None:
    before, after = sharing_weights(), sharing_weights()
    assert own_constants(after) == 2 + 2 * 2  # weights, and scale and zero point
    onnx.checker.check_model(after, full_check=True)
    weights = [node.input[0] for node in after.graph.node if node.op_type == "Clip"]
    weights += [node.input[0] for node in after.graph.node if node.output[0] == "weights3"]
    assert len(set(weights)) == 3
    for name in weights:
        assert np.array_equal(hm.constant(after, name), [[3, -2], [1, 5]])
    assert {tuple(node.input[1:]) for node in after.graph.node if node.op_type == "Clip"} == {("low", "high")}
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert hm.same_answers(before, after, x)
