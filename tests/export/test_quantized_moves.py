"""The pass that lets onnxruntime flatten and max-pool codes instead of floats."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest

from robustq.export.lowering.quantized_moves import quantized_moves
from tests.export import hand_made as hm


def classifier(*, readers: int = 1, zero_point: hm.Constant | None = None, scale: float = 0.1) -> onnx.ModelProto:
    """QuantizeLinear - DequantizeLinear - Flatten - Gemm (as many as ``readers``)."""
    draw = np.random.default_rng(0)
    constants = {
        "s": np.float32(scale),
        "z": np.zeros((), np.uint8) if zero_point is None else zero_point,
        "w": draw.standard_normal((8, 3)).astype(np.float32),
        "b": draw.standard_normal(3).astype(np.float32),
    }
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Flatten", ["values"], "flat"),
        *(hm.node("Gemm", ["flat", "w", "b"], f"y{number}") for number in range(readers)),
    ]
    return hm.model(nodes, constants, x=["n", 8, 1, 1], outputs={f"y{number}": 2 for number in range(readers)})


def pooled(count: int = 64) -> hm.Array:
    return np.random.default_rng(1).uniform(-2, 30, (count, 8, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.0171, 1e-6])
@pytest.mark.parametrize("zero_point", [np.uint8(0), np.uint8(128), np.int8(-5)])
def test_codes_are_quantized_again_without_a_change(zero_point: hm.Constant, scale: float) -> None:
    before = classifier(zero_point=zero_point, scale=scale)
    after = copy.deepcopy(before)
    assert quantized_moves(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert hm.counts(before) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Flatten": 1, "Gemm": 1}
    assert hm.counts(after) == {"QuantizeLinear": 2, "DequantizeLinear": 2, "Flatten": 1, "Gemm": 1}
    assert [node.op_type for node in after.graph.node][2:] == ["Flatten", "QuantizeLinear", "DequantizeLinear", "Gemm"]
    assert hm.same_answers(before, after, pooled() * scale * 10)


def test_every_reader_is_rewired() -> None:
    before = classifier(readers=2)
    after = copy.deepcopy(before)
    assert quantized_moves(after) == 1
    sources = {node.input[0] for node in after.graph.node if node.op_type == "Gemm"}
    assert len(sources) == 1 and "flat" not in sources
    assert hm.same_answers(before, after, pooled())


def test_a_second_run_does_nothing() -> None:
    model = classifier()
    assert quantized_moves(model) == 1
    once = model.SerializeToString()
    assert quantized_moves(model) == 0
    assert model.SerializeToString() == once


def test_a_flatten_of_floats_is_left_alone() -> None:
    model = hm.model([hm.node("Flatten", ["x"], "y")], {}, x=["n", 8, 1, 1], outputs={"y": 2})
    before = model.SerializeToString()
    assert quantized_moves(model) == 0
    assert model.SerializeToString() == before


def test_scales_per_channel_are_left_alone() -> None:
    """Flattening moves the channel axis' elements, so the parameters would no longer belong to them."""
    constants = {"s": np.linspace(0.1, 0.8, 8).astype(np.float32), "z": np.zeros(8, np.uint8)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Flatten", ["values"], "flat"),
        hm.node("Relu", ["flat"], "y"),
    ]
    model = hm.model(nodes, constants, x=["n", 8, 2, 2], outputs={"y": 2})
    before = model.SerializeToString()
    assert quantized_moves(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.uint8(128)])
def test_a_max_pooling_of_codes_is_quantized_again(zero_point: hm.Constant) -> None:
    draw = np.random.default_rng(0)
    constants = {"s": np.float32(0.1), "z": zero_point, "w": draw.standard_normal((3, 8, 1, 1)).astype(np.float32)}
    pool = hm.node("MaxPool", ["values"], "largest", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        pool,
        hm.node("Conv", ["largest", "w"], "y"),
    ]
    before = hm.model(nodes, constants, x=["n", 8, 7, 7], outputs={"y": 4})
    after = copy.deepcopy(before)
    assert quantized_moves(after) == 1
    assert [node.op_type for node in after.graph.node][2:] == ["MaxPool", "QuantizeLinear", "DequantizeLinear", "Conv"]
    assert hm.same_answers(before, after, draw.uniform(-20, 30, (16, 8, 7, 7)).astype(np.float32))


def test_a_chain_is_wrapped_link_by_link() -> None:
    constants = {"s": np.float32(0.1), "z": np.uint8(3), "shape": np.array([0, -1], np.int64)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("MaxPool", ["values"], "pooled", kernel_shape=[2, 2]),
        hm.node("Transpose", ["pooled"], "turned", perm=[0, 2, 3, 1]),
        hm.node("Reshape", ["turned", "shape"], "flat"),
        hm.node("Relu", ["flat"], "y"),
    ]
    before = hm.model(nodes, constants, x=["n", 8, 3, 3], outputs={"y": 2})
    after = copy.deepcopy(before)
    assert quantized_moves(after) == 3
    onnx.checker.check_model(after, full_check=True)
    wrapped = ["QuantizeLinear", "DequantizeLinear"]
    order = [*wrapped, "MaxPool", *wrapped, "Transpose", *wrapped, "Reshape", *wrapped, "Relu"]
    assert [node.op_type for node in after.graph.node] == order
    x = np.random.default_rng(1).uniform(-2, 30, (16, 8, 3, 3)).astype(np.float32)
    assert hm.same_answers(before, after, x)
    assert quantized_moves(after) == 0


def test_every_output_of_a_split_is_wrapped() -> None:
    constants = {"s": np.float32(0.1), "z": np.uint8(0), "sizes": np.array([2, 6], np.int64)}
    split = onnx.helper.make_node("Split", ["values", "sizes"], ["few", "many"], name="split", axis=1)
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        split,
        hm.node("Relu", ["few"], "y"),
        hm.node("Relu", ["many"], "u"),
    ]
    before = hm.model(nodes, constants, x=["n", 8, 2, 2], outputs={"y": 4, "u": 4})
    after = copy.deepcopy(before)
    assert quantized_moves(after) == 2
    onnx.checker.check_model(after, full_check=True)
    names = [node.name for node in after.graph.node]
    assert len(set(names)) == len(names)
    x = np.random.default_rng(1).uniform(-2, 30, (16, 8, 2, 2)).astype(np.float32)
    assert hm.same_answers(before, after, x)
