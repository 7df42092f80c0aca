"""Biases: the step of the accumulator, zero points, and parameter shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from robustq.errors import ExportError
from robustq.export.lowering.biases import accumulator_biases, implied_zero_points
from tests.export import hand_made as hm
from tests.export.exported import parsed

X_SCALE = np.float32(0.125)
W_SCALE = np.array([0.5, 0.25, 2.0], np.float32)  # powers of two: every product and quotient here is exact


def layer(
    *, steps: float = 18, clip: bool = True, largest: int = 7, operation: str = "Conv", entering: str = "xv"
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
        hm.dequantize("bias", "b", "b_s", "b_z", axis=0),
        hm.node(operation, [entering, "w", "b"], "v", **({} if operation == "Conv" else {"transB": 1})),
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


@pytest.mark.parametrize(
    ("steps", "largest", "clip", "operation"),
    [(16, 7, True, "Conv"), (18, 7, False, "Conv"), (42, 3, True, "Gemm"), (127, 1, True, "Conv")],
)
def test_codes_are_multiplied_and_their_scale_divided(steps: int, largest: int, clip: bool, operation: str) -> None:
    before = layer(steps=steps, largest=largest, clip=clip, operation=operation)
    x = images(before)
    # With a power of two nothing is rounded at all; else sums next to a tie of the output may go the other way.
    after = hm.lowered(accumulator_biases, before, x if steps == 16 else None, count=1)
    assert "Clip" not in hm.counts(after)
    codes, scale = weight_of(after)
    assert codes.dtype == np.int8
    assert np.array_equal(codes.astype(int), hm.constant(before, "codes").astype(int) * steps)
    np.testing.assert_allclose(scale * steps, W_SCALE, rtol=2e-7)  # one float32 rounding
    # Now the bias counts in products of the two scales, as QLinearConv takes it.
    np.testing.assert_allclose(X_SCALE * scale, hm.constant(after, "b_s"), rtol=2e-7)
    (one,), (two,) = hm.answers(before, x), hm.answers(after, x)
    assert (one != two).mean() < 1e-3 and np.abs(one - two).max() <= 0.5


def test_a_bias_in_the_accumulators_own_steps_stays() -> None:
    assert hm.unchanged(accumulator_biases, layer(steps=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (layer(steps=2.5), r"its accumulator's step is 2\.5 of its bias' steps, not an integer"),
        (layer(steps=42, largest=7), "weight codes times 42 pass 127"),
        (layer(entering="x"), "its input is not quantized"),
    ],
)
def test_other_biases_are_refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=f"^v_conv: {message}"):
        accumulator_biases(model)


def test_zero_points_of_biases_go_and_those_of_weights_and_activations_stay() -> None:
    before = layer(steps=1)
    after = hm.lowered(implied_zero_points, before, images(before), count=1)
    names = [{tensor.name for tensor in model.graph.initializer} for model in (before, after)]
    assert names[0] - names[1] == {"b_z"}


def bias_quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    made_by = {name: node for node in model.graph.node for name in node.output}
    return [made_by[node.input[2]] for node in model.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("bits", [4, 1])
def test_parameters_of_qonnx_biases_have_one_axis(bits: int) -> None:
    model = parsed(bits, "qonnx")
    found = bias_quantizers(model)
    assert len(found) == 9
    for node in found:
        assert hm.constant(model, node.input[1]).ndim == 1
        assert hm.constant(model, node.input[2]).shape == (1,) and hm.constant(model, node.input[2])[0] == 0
