"""The pass that makes OpenVINO round the branches of a sum."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest

from robustq.export.lowering.rounded_sums import rounded_sums
from tests.export import hand_made as hm


def block(*, zero_point: hm.Constant, between: str | None = None) -> onnx.ModelProto:
    """A sum of x and Conv - QuantizeLinear - DequantizeLinear of x, with an operation behind the convolution or not."""
    constants = {
        "w": np.random.default_rng(0).standard_normal((2, 2, 1, 1)).astype(np.float32),
        "s": np.float32(0.05),
        "z": zero_point,
    }
    nodes = [hm.node("Conv", ["x", "w"], "convolved")]
    if between is not None:
        nodes.append(hm.node(between, ["convolved"], "moved"))
    nodes += [
        hm.quantize("convolved" if between is None else "moved", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.node("Add", ["x", "values"], "y"),
    ]
    return hm.model(nodes, constants, x=["n", 2, 1, 1], outputs={"y": 4})


def images() -> hm.Array:
    return np.random.default_rng(1).uniform(-9, 9, (64, 2, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("between", [None, "Relu"])
@pytest.mark.parametrize("zero_point", [np.uint8(128), np.int8(-3)])
def test_a_branch_is_quantized_again_without_a_change(zero_point: hm.Constant, between: str | None) -> None:
    before = block(zero_point=zero_point, between=between)
    after = copy.deepcopy(before)
    assert rounded_sums(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node][-5:] == [
        *("QuantizeLinear", "DequantizeLinear"),
        *("QuantizeLinear", "DequantizeLinear", "Add"),
    ]
    assert hm.same_answers(before, after, images())


@pytest.mark.parametrize("model", [block(zero_point=np.uint8(0)), block(zero_point=np.uint8(128), between="Abs")])
def test_others_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert rounded_sums(model) == 0
    assert model.SerializeToString() == before
