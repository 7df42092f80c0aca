"""The pass that computes what depends on nothing."""

from __future__ import annotations

import copy

import numpy as np
import onnx

from robustq.export.lowering.constants import folded_constants
from tests.export import hand_made as hm


def model_with_chain() -> onnx.ModelProto:
    """Amounts of a Pad as the exporter writes them: ConstantOfShape - Concat - Reshape - Slice - Transpose - ... - Pad,
    beside a quantized weight whose codes are clipped.
    """
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
        "s": np.float32(0.1),
        "z": np.zeros((), np.int8),
        "low": np.int8(-7),
        "high": np.int8(7),
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
    return hm.model(nodes, constants, x=["n", 2, 5, 6], outputs={"y": 4})


def test_a_chain_folds_whole_and_weights_stay_quantized() -> None:
    before = model_with_chain()
    after = copy.deepcopy(before)
    assert folded_constants(after) == 7
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node] == ["Pad", "DequantizeLinear", "Conv"]
    amounts = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}["amounts"]
    assert amounts.tolist() == [0, 0, 2, 1, 0, 0, 1, 0]
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 6)).astype(np.float32)
    assert hm.same_answers(before, after, x)
    assert folded_constants(after) == 0


def test_what_the_images_decide_stays() -> None:
    nodes = [hm.node("Concat", ["x", "x"], "y", axis=1)]
    model = hm.model(nodes, {}, x=["n", 2, 2, 2], outputs={"y": 4})
    before = model.SerializeToString()
    assert folded_constants(model) == 0
    assert model.SerializeToString() == before
