"""The pass that makes int8 activations uint8: nodes, element types, and the same answers bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest

from robustq.errors import ExportError
from robustq.export.lowering.unsigned_activations import unsigned_activations
from tests.export import hand_made as hm

SCALE = np.float32(0.25)


def inputs() -> hm.Array:
    """Ties and both ends of the range included: multiples of half a step from -40 to 40."""
    return (np.arange(-320, 320) * 0.125).reshape(1, 640).astype(np.float32)


def plain(zero_point: hm.Constant | None = None) -> onnx.ModelProto:
    """QuantizeLinear - Clip - DequantizeLinear of int8 codes."""
    constants = {
        "s": SCALE,
        "z": np.zeros((), np.int8) if zero_point is None else zero_point,
        "low": np.int8(-8),
        "high": np.int8(7),
    }
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.node("Clip", ["codes", "low", "high"], "clipped"),
        hm.dequantize("clipped", "y", "s", "z"),
    ]
    return hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})


def used_types(model: onnx.ModelProto) -> set[str]:
    return {onnx.numpy_helper.to_array(tensor).dtype.name for tensor in model.graph.initializer}


def test_codes_are_shifted_and_nothing_else() -> None:
    before, after = plain(), plain()
    assert unsigned_activations(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert hm.counts(after) == hm.counts(before) == {"QuantizeLinear": 1, "Clip": 1, "DequantizeLinear": 1}
    assert used_types(after) == {"float32", "uint8"}
    quantize, clip, dequantize = after.graph.node
    assert hm.constant(after, quantize.input[2]) == hm.constant(after, dequantize.input[2]) == 128
    assert [int(hm.constant(after, name)) for name in clip.input[1:]] == [120, 135]
    assert hm.same_answers(before, after, inputs())


@pytest.mark.parametrize("zero_point", [-128, -3, 5, 127])
def test_any_int8_zero_point_is_shifted(zero_point: int) -> None:
    before, after = plain(np.int8(zero_point)), plain(np.int8(zero_point))
    assert unsigned_activations(after) == 1
    assert hm.constant(after, after.graph.node[0].input[2]) == zero_point + 128
    assert hm.same_answers(before, after, inputs())


def test_the_whole_range_without_a_clip() -> None:
    constants = {"s": SCALE, "z": np.zeros((), np.int8)}
    nodes = [hm.quantize("x", "codes", "s", "z"), hm.dequantize("codes", "y", "s", "z")]
    before = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    after = copy.deepcopy(before)
    assert unsigned_activations(after) == 1
    wide = np.arange(-1100, 1100, dtype=np.float32).reshape(1, -1) / 32
    assert hm.same_answers(before, after, wide)
    assert len(np.unique(hm.answers(after, wide)[0])) == 256


def test_every_reader_is_shifted() -> None:
    """Two DequantizeLinear, one of them without a zero point (0 is its default), and one behind a Clip."""
    constants = {"s": SCALE, "z": np.zeros((), np.int8), "low": np.int8(-4), "high": np.int8(3)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "y", "s", "z"),
        hm.dequantize("codes", "y2", "s"),
        hm.node("Clip", ["codes", "low", "high"], "clipped"),
        hm.dequantize("clipped", "y3", "s", "z"),
    ]
    before = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2, "y2": 2, "y3": 2})
    after = copy.deepcopy(before)
    assert unsigned_activations(after) == 1
    assert used_types(after) == {"float32", "uint8"}
    assert hm.same_answers(before, after, inputs())


def test_zero_points_per_channel() -> None:
    constants = {"s": np.array([0.25, 0.5], np.float32), "z": np.array([0, -7], np.int8)}
    nodes = [
        hm.quantize("x", "codes", "s", "z", axis=0),
        hm.dequantize("codes", "y", "s", "z", axis=0),
    ]
    before = hm.model(nodes, constants, x=[2, "n"], outputs={"y": 2})
    after = copy.deepcopy(before)
    assert unsigned_activations(after) == 1
    assert hm.same_answers(before, after, np.concatenate([inputs(), inputs()]))


def test_weights_stay_int8() -> None:
    """A weight is a constant, kept as codes or quantized on the spot; unsigned activations are left alone too."""
    draw = np.random.default_rng(0)
    constants = {
        "s": SCALE,
        "z": np.uint8(3),
        "ws": np.float32(0.1),
        "wz": np.zeros((), np.int8),
        "w": draw.integers(-127, 128, (2, 1, 3, 3)).astype(np.int8),
        "v": draw.standard_normal((2, 2, 1, 1)).astype(np.float32),
    }
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.dequantize("w", "weight", "ws", "wz"),
        hm.node("Conv", ["values", "weight"], "mid"),
        hm.quantize("v", "v_codes", "ws", "wz"),
        hm.dequantize("v_codes", "v_values", "ws", "wz"),
        hm.node("Conv", ["mid", "v_values"], "y"),
    ]
    model = hm.model(nodes, constants, x=[1, 1, 5, 5], outputs={"y": 4})
    before = model.SerializeToString()
    assert unsigned_activations(model) == 0
    assert model.SerializeToString() == before


def test_between_convolutions_only_the_activation_changes() -> None:
    draw = np.random.default_rng(1)
    constants = {
        "s": SCALE,
        "z": np.zeros((), np.int8),
        "ws": np.float32(0.1),
        "w": draw.integers(-127, 128, (2, 1, 3, 3)).astype(np.int8),
    }
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.dequantize("w", "weight", "ws", "z"),  # shares its zero point with the activation
        hm.node("Conv", ["values", "weight"], "y"),
    ]
    before = hm.model(nodes, constants, x=[1, 1, 6, 6], outputs={"y": 4})
    after = copy.deepcopy(before)
    assert unsigned_activations(after) == 1
    onnx.checker.check_model(after, full_check=True)
    weight = next(node for node in after.graph.node if node.output[0] == "weight")
    assert hm.constant(after, weight.input[0]).dtype == hm.constant(after, weight.input[2]).dtype == np.int8
    assert hm.same_answers(before, after, draw.standard_normal((1, 1, 6, 6)) * 10)


def test_a_second_run_does_nothing() -> None:
    model = plain()
    assert unsigned_activations(model) == 1
    once = model.SerializeToString()
    assert unsigned_activations(model) == 0
    assert model.SerializeToString() == once


def test_stale_element_types_are_dropped() -> None:
    model = plain()
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("codes", hm.INT8, None))
    assert unsigned_activations(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert not model.graph.value_info


def test_another_reader_of_int8_codes_is_refused() -> None:
    constants = {"s": SCALE, "z": np.zeros((), np.int8)}
    nodes = [hm.quantize("x", "codes", "s", "z"), hm.node("Cast", ["codes"], "y", to=hm.FLOAT)]
    model = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    with pytest.raises(ExportError, match=r"^y_cast \(Cast\) reads int8 codes of codes_q; cannot shift them$"):
        unsigned_activations(model)


def test_a_clip_with_a_computed_bound_is_refused() -> None:
    constants = {"s": SCALE, "z": np.zeros((), np.int8), "two": np.int8(2)}
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.node("Identity", ["two"], "low"),
        hm.node("Clip", ["codes", "low"], "clipped"),
        hm.dequantize("clipped", "y", "s", "z"),
    ]
    model = hm.model(nodes, constants, x=[1, "n"], outputs={"y": 2})
    with pytest.raises(ExportError, match=r"^clipped_clip: .*computed bound"):
        unsigned_activations(model)
