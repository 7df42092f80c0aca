"""Values are quantized again onto their own grid, and nothing changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from robustq.export.lowering.requantize import quantized_moves, rounded_sums
from tests.export import hand_made as hm

PAIR = ["QuantizeLinear", "DequantizeLinear"]
THREE = np.uint8(3)
X = np.random.default_rng(1).uniform(-2, 30, (16, 8, 7, 7)).astype(np.float32)


def codes(nodes: list[onnx.NodeProto], *, zero_point: hm.Constant = THREE, **options: object) -> onnx.ModelProto:
    """QuantizeLinear - DequantizeLinear - ``nodes``, from ``values`` to ``y``."""
    constants = {"s": np.float32(0.1), "z": zero_point, "shape": np.array([0, -1], np.int64), **options}
    quantized = [hm.quantize("x", "codes", "s", "z"), hm.dequantize("codes", "values", "s", "z")]
    outputs = {name: 4 if nodes[-1].op_type in ("Conv", "Neg") else 2 for name in ("y", "u") if produced(nodes, name)}
    return hm.model([*quantized, *nodes], constants, x=["n", 8, 7, 7], outputs=outputs)


def produced(nodes: list[onnx.NodeProto], name: str) -> bool:
    return any(name in node.output for node in nodes)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 1e-6])
@pytest.mark.parametrize("zero_point", [np.uint8(0), np.uint8(128), np.int8(-5)])
def test_a_flatten_is_wrapped_for_every_reader(zero_point: hm.Constant, scale: float) -> None:
    nodes = [hm.node("Flatten", ["values"], "flat"), hm.node("Relu", ["flat"], "y"), hm.node("Abs", ["flat"], "u")]
    before = codes(nodes, zero_point=zero_point, s=np.float32(scale))
    after = hm.lowered(quantized_moves, before, X * scale * 10, count=1)
    assert kinds(after) == [*PAIR, "Flatten", *PAIR, "Relu", "Abs"]


def test_a_chain_is_wrapped_link_by_link() -> None:
    nodes = [
        hm.node("MaxPool", ["values"], "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        hm.node("Transpose", ["pooled"], "turned", perm=[0, 2, 3, 1]),
        hm.node("Reshape", ["turned", "shape"], "flat"),
        hm.node("Relu", ["flat"], "y"),
    ]
    after = hm.lowered(quantized_moves, codes(nodes), X, count=3)
    assert kinds(after) == [*PAIR, "MaxPool", *PAIR, "Transpose", *PAIR, "Reshape", *PAIR, "Relu"]


def test_every_output_of_a_split_is_wrapped() -> None:
    split = onnx.helper.make_node("Split", ["values", "sizes"], ["few", "many"], name="split", axis=1)
    nodes = [split, hm.node("Neg", ["few"], "y"), hm.node("Neg", ["many"], "u")]
    after = hm.lowered(quantized_moves, codes(nodes, sizes=np.array([2, 6], np.int64)), X, count=2)
    names = [node.name for node in after.graph.node]
    assert len(set(names)) == len(names)


def test_moves_of_floats_and_of_scales_per_channel_stay() -> None:
    """Flattening moves the elements of the channel axis: the parameters would no longer belong to them."""
    floats = hm.model([hm.node("Flatten", ["x"], "y")], {}, x=["n", 8, 1, 1], outputs={"y": 2})
    assert hm.unchanged(quantized_moves, floats)
    nodes = [hm.node("Flatten", ["values"], "flat"), hm.node("Relu", ["flat"], "y")]
    scales = np.linspace(0.1, 0.8, 8).astype(np.float32)
    assert hm.unchanged(quantized_moves, codes(nodes, zero_point=np.zeros(8, np.uint8), s=scales))


def block(*, zero_point: hm.Constant, between: str | None = None) -> onnx.ModelProto:
    """A sum of x and Conv - QuantizeLinear - DequantizeLinear of x, with an operator behind the convolution or not."""
    weight = np.random.default_rng(0).standard_normal((2, 2, 1, 1)).astype(np.float32)
    nodes = [hm.node("Conv", ["x", "w"], "convolved")]
    if between is not None:
        nodes.append(hm.node(between, ["convolved"], "moved"))
    nodes += [
        hm.quantize("convolved" if between is None else "moved", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Add", ["x", "values"], "y"),
    ]
    constants = {"w": weight, "s": np.float32(0.05), "z": zero_point}
    return hm.model(nodes, constants, x=["n", 2, 1, 1], outputs={"y": 4})


@pytest.mark.parametrize("between", [None, "Relu"])
@pytest.mark.parametrize("zero_point", [np.uint8(128), np.int8(-3)])
def test_a_branch_of_a_sum_is_quantized_again(zero_point: hm.Constant, between: str | None) -> None:
    before = block(zero_point=zero_point, between=between)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert rounded_sums(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert kinds(after)[-5:] == [*PAIR, *PAIR, "Add"]
    assert hm.same_answers(before, after, np.random.default_rng(1).uniform(-9, 9, (64, 2, 1, 1)).astype(np.float32))


@pytest.mark.parametrize("model", [block(zero_point=np.uint8(0)), block(zero_point=np.uint8(128), between="Abs")])
def test_other_branches_stay(model: onnx.ModelProto) -> None:
    assert hm.unchanged(rounded_sums, model)
