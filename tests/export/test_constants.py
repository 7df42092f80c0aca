"""Constants of nodes, and operators on constants."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from robustq.export.lowering.constants import folded_constants, own_constants
from tests.export import hand_made as hm


@pytest.mark.parametrize("named", [True, False])
def test_shared_parameters_are_copied(named: bool) -> None:
    constants = {"s": np.float32(0.25), "z": np.uint8(7), "unused": np.ones(2, np.float32)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Neg", ["values"], "negated"),
        hm.quantize("negated", "codes2", "s", "z"),
        hm.dequantize("codes2", "y", "s", "z"),
    ]
    if not named:  # exporters need not name nodes
        nodes[1].name = nodes[3].name = nodes[4].name = ""
    before = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    after = hm.lowered(own_constants, before, np.linspace(-50, 50, 801, dtype=np.float32).reshape(1, -1), count=6)
    assert hm.counts(after) == hm.counts(before)
    uses = Counter(name for node in after.graph.node if "Linear" in node.op_type for name in node.input[1:])
    assert len(uses) == 8 and set(uses.values()) == {1}
    assert {tensor.name for tensor in after.graph.initializer} == set(uses)  # the unused constant went


def test_other_nodes_may_share() -> None:
    nodes = [hm.node("Add", ["x", "one"], "mid"), hm.node("Mul", ["mid", "one"], "y")]
    model = hm.model(nodes, {"one": np.float32(1.0)}, x=[1, "n"], outputs={"y": 2})
    assert hm.unchanged(own_constants, model)


def test_shared_weights_are_copied_and_bounds_are_not() -> None:
    """Equal 8-bit layers, two of them clipped as QCDQ clips them."""
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
    before = hm.model(nodes, constants, x=["n", 2], outputs={"y": 2})
    after = hm.lowered(own_constants, before, np.arange(8, dtype=np.float32).reshape(4, 2), count=2 + 2 * 2)
    weights = [node.input[0] for node in after.graph.node if node.op_type == "Clip" or node.output[0] == "weights3"]
    assert len(set(weights)) == 3
    assert {tuple(node.input[1:]) for node in after.graph.node if node.op_type == "Clip"} == {("low", "high")}


def test_a_chain_folds_whole_and_weights_stay_quantized() -> None:
    """Amounts of a Pad as the exporter writes them, beside a quantized weight whose codes are clipped."""
    constants = {
        "shape": np.array([4], np.int64),
        "given": np.array([1, 0, 2, 1], np.int64),
        "rows": np.array([-1, 2], np.int64),
        "starts": np.array([-1], np.int64),
        "ends": np.array([-(2**31)], np.int64),
        "axes": np.array([0], np.int64),
        "steps": np.array([-1], np.int64),
        "flat": np.array([-1], np.int64),
        "codes": np.arange(18, dtype=np.int8).reshape(1, 2, 3, 3),
        **{"s": np.float32(0.1), "z": np.zeros((), np.int8), "low": np.int8(-7), "high": np.int8(7)},
    }
    nodes = [
        hm.node("ConstantOfShape", ["shape"], "zeros", value=onnx.numpy_helper.from_array(np.zeros(1, np.int64))),
        hm.node("Concat", ["given", "zeros"], "all", axis=0),
        hm.node("Reshape", ["all", "rows"], "pairs"),
        hm.node("Slice", ["pairs", "starts", "ends", "axes", "steps"], "turned"),
        hm.node("Transpose", ["turned"], "columns", perm=[1, 0]),
        hm.node("Reshape", ["columns", "flat"], "amounts"),
        hm.node("Pad", ["x", "amounts"], "padded"),
        hm.node("Clip", ["codes", "low", "high"], "clipped"),
        hm.dequantize("clipped", "w", "s", "z"),
        hm.node("Conv", ["padded", "w"], "y"),
    ]
    before = hm.model(nodes, constants, x=["n", 2, 5, 6], outputs={"y": 4})
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 6)).astype(np.float32)
    after = hm.lowered(folded_constants, before, x, count=7)
    assert [node.op_type for node in after.graph.node] == ["Pad", "DequantizeLinear", "Conv"]
    assert hm.constant(after, "amounts").tolist() == [0, 0, 2, 1, 0, 0, 1, 0]


def test_operators_on_images_stay() -> None:
    model = hm.model([hm.node("Concat", ["x", "x"], "y", axis=1)], {}, x=["n", 2, 2, 2], outputs={"y": 4})
    assert hm.unchanged(folded_constants, model)
