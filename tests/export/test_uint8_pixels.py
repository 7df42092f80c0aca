"""The pass that lets a file take uint8 pixels."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from robustq.export.lowering.uint8_pixels import uint8_pixels
from tests.export import hand_made as hm


def model(kind: str) -> onnx.ModelProto:
    constants = {"s": np.float32(1 / 255), "z": np.uint8(0), "mean": np.float32(0.4)}
    if kind == "another scale":
        constants["s"] = np.float32(1 / 200)
    if kind == "zero point":
        constants["z"] = np.uint8(1)
    nodes = [hm.quantize("x", "q", "s", "z"), hm.dequantize("q", "v", "s", "z"), hm.node("Neg", ["v"], "y")]
    outputs = {"y": 2}
    if kind == "normalised":
        nodes = [hm.node("Sub", ["x", "mean"], "centred"), hm.node("Neg", ["centred"], "y")]
    if kind == "two readers":
        nodes.append(hm.node("Sub", ["x", "mean"], "y2"))
        outputs["y2"] = 2
    return hm.model(nodes, constants, x=["n", 256], outputs=outputs)


PIXELS = np.arange(256, dtype=np.uint8).reshape(1, -1)


@pytest.mark.parametrize(
    ("kind", "went"),
    [("pixels", True), ("another scale", False), ("zero point", False), ("normalised", False), ("two readers", False)],
)
def test_answers_are_the_same_for_every_pixel(kind: str, went: bool) -> None:
    before, after = model(kind), model(kind)
    expected = hm.answers(before, PIXELS.astype(np.float32) / np.float32(255))
    assert uint8_pixels(after) is went
    onnx.checker.check_model(after, full_check=True)
    assert after.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert ("Cast" in hm.counts(after)) is not went
    session = ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, {"x": PIXELS}), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
