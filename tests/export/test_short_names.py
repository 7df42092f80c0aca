"""Short names: the same answers, and layers that keep their modules' names."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime as ort

from robustq.export.lowering.short_names import short_names
from tests.export.exported import parsed


def test_short_names_change_no_answer() -> None:
    before = parsed(4, "integer")
    after = copy.deepcopy(before)
    assert short_names(after) > 50
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)

    def answers(model: onnx.ModelProto) -> bytes:
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
