"""The passes that leave out what nobody reads: zero points that are the default, and long names."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest

from robustq.export.lowering.short_names import module_name, short_names
from robustq.export.lowering.zero_points import implied_zero_points
from tests.export import hand_made as hm
from tests.export.exported import parsed


def layer(bias_zero: int = 0) -> onnx.ModelProto:
    constants = {
        "x_s": np.float32(0.1),
        "x_z": np.uint8(0),
        "codes": np.array([[1, -2], [3, 4]], np.int8),
        "w_s": np.array([0.5, 0.25], np.float32),
        "w_z": np.zeros(2, np.int8),
        "bias": np.array([10, -20], np.int32),
        "b_s": np.array([0.05, 0.025], np.float32),
        "b_z": np.full(2, bias_zero, np.int32),
    }
    nodes = [
        hm.quantize("x", "q", "x_s", "x_z"),
        hm.dequantize("q", "v", "x_s", "x_z"),
        hm.dequantize("codes", "w", "w_s", "w_z", axis=0),
        hm.dequantize("bias", "b", "b_s", "b_z", axis=0),
        hm.node("Gemm", ["v", "w", "b"], "y", transB=1),
    ]
    return hm.model(nodes, constants, x=["n", 2], outputs={"y": 2})


def images() -> hm.Array:
    return np.random.default_rng(0).uniform(0, 25, (9, 2)).astype(np.float32)


def test_zero_points_of_biases_go_and_those_of_weights_and_activations_stay() -> None:
    before = layer()
    after = copy.deepcopy(before)
    assert implied_zero_points(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert {tensor.name for tensor in before.graph.initializer} - {
        tensor.name for tensor in after.graph.initializer
    } == {"b_z"}
    assert hm.same_answers(before, after, images())
    assert implied_zero_points(after) == 0


def test_a_zero_point_that_is_not_zero_stays() -> None:
    assert implied_zero_points(layer(bias_zero=3)) == 0


@pytest.mark.parametrize("bits", [4, 1])
def test_short_names_change_no_answer(bits: int) -> None:
    before = parsed(bits, "integer")
    after = copy.deepcopy(before)
    assert short_names(after) > 50
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)

    def answers(model: onnx.ModelProto) -> bytes:
        import onnxruntime as ort

        return bytes(ort.InferenceSession(model.SerializeToString()).run(None, {"images": x})[0].tobytes())

    assert answers(after) == answers(before)
    assert [value.name for value in [*after.graph.input, *after.graph.output]] == ["images", "logits"]
    inner = {name for node in after.graph.node for name in node.output} - {"logits"}
    assert max(map(len, inner)) <= 3
    assert len(after.SerializeToString()) < len(before.SerializeToString()) - 10_000


def test_layers_keep_their_modules_names() -> None:
    model = parsed(4, "packed")
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and "layer2.0.downsample.0" in names
    assert {node.name for node in model.graph.node if node.op_type == "Add"} >= {"layer1.0.add", "layer2.0.add"}


@pytest.mark.parametrize(
    ("exported", "module"),
    [
        ("/conv1/Conv", "conv1"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/layer2/layer2.0/downsample/downsample.0/Conv", "layer2.0.downsample.0"),
        ("/layer3/layer3.0/Add_1", "layer3.0.add_1"),
        ("/fc/Gemm", "fc"),
        ("/avgpool/GlobalAveragePool", "avgpool.globalaveragepool"),
        ("Conv_7", "Conv_7"),
    ],
)
def test_module_names(exported: str, module: str) -> None:
    assert module_name(exported) == module
