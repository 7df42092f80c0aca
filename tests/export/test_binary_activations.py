"""Binary activations as comparisons of uint8 codes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustq.errors import ExportError
from robustq.export.lowering.binary_activations import binary_activations
from tests.export import hand_made as hm

STEP = np.float32(0.37)


def thresholds(first: list[int], rises: list[bool | None]) -> tuple[hm.Array, hm.Array]:
    """Gain and threshold (C, 1, 1) in half steps of the codes 0 .. 255 around 128: +1 from ``first`` on, or below it
    where it does not rise; None for a channel that is +1 throughout.
    """
    gain = np.array([0.0 if up is None else 2.0 if up else -2.0 for up in rises]) / STEP
    odd = [
        -1.0 if up is None else (2 * (code - 128) - 1) * (1 if up else -1)
        for code, up in zip(first, rises, strict=True)
    ]
    return gain.astype(np.float32).reshape(-1, 1, 1), np.array(odd, np.float32).reshape(-1, 1, 1)


def chain(first: list[int], rises: list[bool | None], *, group: int = 1, also: str | None = None) -> onnx.ModelProto:
    """Codes - thresholds - binary activations - a convolution with padding; ``also``: another reader."""
    channels = len(first)
    gain, threshold = thresholds(first, rises)
    draw = np.random.default_rng(0)
    constants = {
        "s": STEP,
        "z": np.uint8(128),
        "gain": gain,
        "threshold": threshold,
        "unit": np.float32(1),
        "half": np.uint8(128),
        "low": np.uint8(127),
        "high": np.uint8(129),
        "codes": draw.choice(np.array([-1, 1], np.int8), (4, channels // group, 3, 3)),
        "w_s": np.float32(0.5),
    }
    nodes = [
        hm.quantize("x", "stream", "s", "z"),
        hm.dequantize("stream", "values", "s", "z"),
        hm.node("Mul", ["gain", "values"], "product"),
        hm.node("Sub", ["product", "threshold"], "distance"),
        hm.quantize("distance", "wide", "unit", "half"),
        hm.node("Clip", ["wide", "low", "high"], "clipped"),
        hm.dequantize("clipped", "binary", "unit", "half"),
        hm.dequantize("codes", "w", "w_s"),
        hm.node("Conv", ["binary", "w"], "y", pads=[1, 1, 1, 1], group=group),
    ]
    outputs = {"y": 4}
    if also is not None:
        nodes.append(hm.node(also, ["binary"], "y2"))
        outputs["y2"] = 4
    return hm.model(nodes, constants, x=["n", channels, 5, 7], outputs=outputs)


def images(channels: int) -> hm.Array:
    return np.random.default_rng(1).uniform(-50, 50, (6, channels, 5, 7)).astype(np.float32)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(1, 255), st.sampled_from([True, False, None])), min_size=1, max_size=6))
def test_the_convolution_sums_up_the_same(channels: list[tuple[int, bool | None]]) -> None:
    first, rises = [code for code, _ in channels], [up for _, up in channels]
    after = hm.lowered(binary_activations, chain(first, rises), images(len(first)), count=1)
    operations = hm.counts(after)
    assert (operations["Less"], operations["Where"]) == (1, 1)
    assert not {"Mul", "Sub", "Clip"} & set(operations)


def test_a_value_that_others_read_stays() -> None:
    before = chain([3, 200], [True, False])
    before.graph.node.append(hm.node("Neg", ["values"], "y2"))
    before.graph.output.append(onnx.helper.make_tensor_value_info("y2", hm.FLOAT, ["n", 2, 5, 7]))
    hm.lowered(binary_activations, before, images(2), count=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            chain([9, 9], [True, False], group=2),
            "y_conv (Conv) reads binary activations; only convolutions of one group can",
        ),
        (
            chain([9, 9], [True, False], also="Neg"),
            "y2_neg (Neg) reads binary activations; only convolutions of one group can",
        ),
    ],
)
def test_other_readers_are_refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError) as caught:
        binary_activations(model)
    assert str(caught.value) == message


def test_a_clip_whose_values_include_zero_is_refused() -> None:
    model = chain([9, 9], [True, False])
    (threshold,) = (tensor for tensor in model.graph.initializer if tensor.name == "threshold")
    threshold.CopyFrom(onnx.numpy_helper.from_array(np.full((2, 1, 1), 4, np.float32), "threshold"))  # an even number
    with pytest.raises(ExportError, match="is not -1 and \\+1 on either side of one code"):
        binary_activations(model)
