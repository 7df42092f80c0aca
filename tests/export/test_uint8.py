"""int8 activations and float pixels become uint8: nodes, element types, and the same answers bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from robustq.errors import ExportError
from robustq.export.lowering.uint8 import uint8_pixels, unsigned_activations
from tests.export import hand_made as hm

SCALE = np.float32(0.25)
ZERO = np.zeros((), np.int8)
# Ties and both ends of the range included: multiples of half a step from -40 to 40.
X = (np.arange(-320, 320) * 0.125).reshape(1, 640).astype(np.float32)


def plain(zero_point: hm.Constant = ZERO) -> onnx.ModelProto:
    """QuantizeLinear - Clip - DequantizeLinear of int8 codes."""
    constants = {"s": SCALE, "z": zero_point, "low": np.int8(-8), "high": np.int8(7)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.node("Clip", ["codes", "low", "high"], "clipped"),
        hm.dequantize("clipped", "y", "s", "z"),
    ]
    return hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})


def used_types(model: onnx.ModelProto) -> set[str]:
    return {onnx.numpy_helper.to_array(tensor).dtype.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
def test_codes_are_shifted_and_nothing_else(zero_point: int) -> None:
    before = plain(np.int8(zero_point))
    before.graph.value_info.append(onnx.helper.make_tensor_value_info("codes", hm.INT8, None))
    after = hm.lowered(unsigned_activations, before, X, count=1)
    assert hm.counts(after) == hm.counts(before) and used_types(after) == {"float32", "uint8"}
    quantize, clip, dequantize = after.graph.node
    assert hm.constant(after, quantize.input[2]) == hm.constant(after, dequantize.input[2]) == zero_point + 128
    assert [int(hm.constant(after, name)) for name in clip.input[1:]] == [120, 135]


def test_every_reader_is_shifted() -> None:
    """Two DequantizeLinear, one of them without a zero point (0 is its default), and one behind a Clip."""
    constants = {"s": SCALE, "z": ZERO, "low": np.int8(-4), "high": np.int8(3)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "y", "s", "z"),
        hm.dequantize("codes", "y2", "s"),
        hm.node("Clip", ["codes", "low", "high"], "clipped"),
        hm.dequantize("clipped", "y3", "s", "z"),
    ]
    before = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2, "y2": 2, "y3": 2})
    assert used_types(hm.lowered(unsigned_activations, before, X, count=1)) == {"float32", "uint8"}


def test_weights_and_unsigned_activations_stay() -> None:
    draw = np.random.default_rng(0)
    constants = {
        **{"s": SCALE, "z": np.uint8(3), "ws": np.float32(0.1), "wz": ZERO},
        "w": draw.integers(-127, 128, (2, 1, 3, 3)).astype(np.int8),
        "v": draw.standard_normal((2, 2, 1, 1)).astype(np.float32),
    }
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.dequantize("w", "weight", "ws", "wz"),
        hm.node("Conv", ["values", "weight"], "mid"),
        hm.quantize("v", "v_codes", "ws", "wz"),  # a constant that is quantized in the graph
        hm.dequantize("v_codes", "v_values", "ws", "wz"),
        hm.node("Conv", ["mid", "v_values"], "y"),
    ]
    assert hm.unchanged(unsigned_activations, hm.model(nodes, constants, x=[1, 1, 5, 5], outputs={"y": 4}))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [hm.node("Cast", ["codes"], "y", to=hm.FLOAT)],
            r"^y_cast \(Cast\) reads int8 codes of codes_q; cannot shift them$",
        ),
        (
            [
                hm.node("Identity", ["two"], "low"),
                hm.node("Clip", ["codes", "low"], "clipped"),
                hm.dequantize("clipped", "y", "s", "z"),
            ],
            r"^clipped_clip: .*computed bound",
        ),
    ],
)
def test_other_readers_are_refused(nodes: list[onnx.NodeProto], message: str) -> None:
    constants = {"s": SCALE, "z": ZERO, "two": np.int8(2)}
    model = hm.model([hm.quantize("x", "codes", "s", "z"), *nodes], constants, x=[1, "n"], outputs={"y": 2})
    with pytest.raises(ExportError, match=message):
        unsigned_activations(model)


def pixel_model(kind: str) -> onnx.ModelProto:
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


@pytest.mark.parametrize(
    ("kind", "went"),
    [("pixels", True), ("another scale", False), ("zero point", False), ("normalised", False), ("two readers", False)],
)
def test_answers_are_the_same_for_every_pixel(kind: str, went: bool) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, -1)
    model = pixel_model(kind)
    expected = hm.answers(model, pixels.astype(np.float32) / np.float32(255))
    assert uint8_pixels(model) is went
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert ("Cast" in hm.counts(model)) is not went
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, {"x": pixels}), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
