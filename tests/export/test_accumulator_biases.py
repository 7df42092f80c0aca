"""The pass that makes an accumulator count in the steps of its bias."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest

from robustq.errors import ExportError
from robustq.export.lowering.accumulator_biases import accumulator_biases
from tests.export import hand_made as hm

X_SCALE = np.float32(0.125)
W_SCALE = np.array([0.5, 0.25, 2.0], np.float32)  # powers of two: every product and quotient here is exact


def layer(
    *, steps: float = 18, clip: bool = True, largest: int = 7, operation: str = "Conv", bias_scale: str = "b_s"
) -> onnx.ModelProto:
    """uint8 input, 3 channels of int8 codes up to ``largest``, an int32 bias that counts ``steps`` times finer."""
    draw = np.random.default_rng(0)
    shape = (3, 4, 1, 1) if operation == "Conv" else (3, 4)
    codes = draw.integers(-largest, largest + 1, shape).astype(np.int8)
    codes.flat[0] = largest
    constants = {
        "x_s": X_SCALE,
        "x_z": np.uint8(0),
        "codes": codes,
        "low": np.int8(-largest),
        "high": np.int8(largest),
        "w_s": W_SCALE,
        "w_z": np.zeros(3, np.int8),
        "bias": np.array([300, -5, 77], np.int32),
        "b_s": (X_SCALE * W_SCALE / np.float32(steps)).astype(np.float32),
        "b_z": np.zeros(3, np.int32),
        "y_s": np.float32(0.5),
        "y_z": np.uint8(0),
    }
    nodes = [hm.quantize("x", "xq", "x_s", "x_z"), hm.dequantize("xq", "xv", "x_s", "x_z")]
    if clip:
        nodes.append(hm.node("Clip", ["codes", "low", "high"], "clipped"))
    nodes += [
        hm.dequantize("clipped" if clip else "codes", "w", "w_s", "w_z", axis=0),
        hm.dequantize("bias", "b", bias_scale, "b_z", axis=0),
        hm.node(operation, ["xv", "w", "b"], "v", **({} if operation == "Conv" else {"transB": 1})),
        hm.quantize("v", "vq", "y_s", "y_z"),
        hm.dequantize("vq", "y", "y_s", "y_z"),
    ]
    x: list[int | str] = ["n", 4, 5, 5] if operation == "Conv" else ["n", 4]
    return hm.model(nodes, constants, x=x, outputs={"y": len(x)})


def images(model: onnx.ModelProto) -> hm.Array:
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    return np.random.default_rng(1).uniform(0, 30, (32, 4, 5, 5)[: 2 if rank == 2 else 4]).astype(np.float32)


def weight_of(model: onnx.ModelProto) -> tuple[hm.Array, hm.Array]:
    """(codes, scale) behind the layer."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    (node,) = (node for node in model.graph.node if node.op_type in ("Conv", "Gemm"))
    dequantize = made_by[node.input[1]]
    return hm.constant(model, dequantize.input[0]), hm.constant(model, dequantize.input[1])


@pytest.mark.parametrize("operation", ["Conv", "Gemm"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "largest"), [(16, 7), (18, 7), (42, 3), (127, 1)])
def test_codes_are_multiplied_and_their_scale_divided(steps: int, largest: int, clip: bool, operation: str) -> None:
    before = layer(steps=steps, largest=largest, clip=clip, operation=operation)
    after = copy.deepcopy(before)
    assert accumulator_biases(after) == 1
    onnx.checker.check_model(after, full_check=True)
    assert "Clip" not in hm.counts(after)
    codes, scale = weight_of(after)
    assert codes.dtype == np.int8
    assert np.array_equal(codes.astype(int), hm.constant(before, "codes").astype(int) * steps)
    np.testing.assert_allclose(scale * steps, W_SCALE, rtol=2e-7)  # one float32 rounding
    # Now the bias counts in products of the two scales, as QLinearConv takes it.
    np.testing.assert_allclose(X_SCALE * scale, hm.constant(after, "b_s"), rtol=2e-7)
    x = images(before)
    if steps == 16:  # a power of two: nothing is rounded at all
        assert hm.same_answers(before, after, x)
    else:  # sums next to a tie of the output may go the other way
        (one,), (two,) = hm.answers(before, x), hm.answers(after, x)
        assert (one != two).mean() < 1e-3 and np.abs(one - two).max() <= 0.5


def test_the_input_may_pass_through_operations_that_choose_values() -> None:
    model = layer()
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.input[0] = "pooled"
    pool = hm.node("MaxPool", ["xv"], "pooled", kernel_shape=[2, 2])
    model.graph.node.insert(list(model.graph.node).index(conv), pool)
    codes, _ = weight_of(layer(clip=False))
    assert accumulator_biases(model) == 1
    assert np.array_equal(weight_of(model)[0].astype(int), codes.astype(int) * 18)


def test_an_input_that_is_not_quantized_is_refused() -> None:
    model = layer()
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "x"
    with pytest.raises(ExportError, match=r"^v_conv: its input is not quantized"):
        accumulator_biases(model)


def test_then_onnxruntime_runs_it_as_integers(tmp_path: Path) -> None:
    path = tmp_path / "layer.onnx"
    model = layer()
    onnx.save(model, path)
    assert hm.optimised_operations(path, arm_defaults=False)["QLinearConv"] == 0
    accumulator_biases(model)
    onnx.save(model, path)
    assert hm.optimised_operations(path, arm_defaults=False)["QLinearConv"] == 1


def test_a_bias_in_the_accumulators_own_steps_is_left_alone() -> None:
    model = layer(steps=1)
    before = model.SerializeToString()
    assert accumulator_biases(model) == 0
    assert model.SerializeToString() == before


def test_a_second_run_does_nothing() -> None:
    model = layer()
    accumulator_biases(model)
    once = model.SerializeToString()
    assert accumulator_biases(model) == 0
    assert model.SerializeToString() == once


@pytest.mark.parametrize("steps", [2.5, 0.25])
def test_other_units_are_refused(steps: float) -> None:
    with pytest.raises(ExportError, match=r"v_conv: its accumulator's step is [\d.]+ of its bias' steps, no"):
        accumulator_biases(layer(steps=steps))


def test_codes_that_would_leave_8_bits_are_refused() -> None:
    with pytest.raises(ExportError, match=r"v_conv: weight codes times 42 pass 127"):
        accumulator_biases(layer(steps=42, largest=7))
