"""The smallest file for each limit of onnxruntime's kernels: right below it, wrong or refused to run above it."""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from robustq.errors import ExportError
from robustq.export.ranges import check_ranges
from tests.export import hand_made as hm

ON_X86 = platform.machine() in ("x86_64", "AMD64")


def quantized(
    node: onnx.NodeProto, constants: dict[str, hm.Constant], *, own_step: float, step: float = 1.0
) -> onnx.ModelProto:
    """x, as codes of ``step`` - ``node`` (v -> y) - codes of ``own_step``, which come out as they are."""
    zero = np.uint8(128)
    own = {"s": np.float32(step), "z": zero, "t": np.float32(own_step), "tz": zero, "u": np.float32(1), "uz": zero}
    nodes = [hm.quantize("x", "cx", "s", "z"), hm.dequantize("cx", "v", "s", "z")]
    if "v2" in node.input:
        constants = {**constants, "s2": np.float32(step / 3), "z2": zero}
        nodes += [hm.quantize("x", "cx2", "s2", "z2"), hm.dequantize("cx2", "v2", "s2", "z2")]
    if "w" in constants:
        nodes.append(hm.dequantize("w", "wv", "ws"))
    if "b" in constants:
        nodes.append(hm.dequantize("b", "bv", "bs"))
    nodes += [node, hm.quantize("y", "cy", "t", "tz"), hm.dequantize("cy", "codes", "u", "uz")]
    return hm.model(nodes, {**own, **constants}, x=["n", 2, 8, 8], outputs={"codes": 4})


def optimised(made: onnx.ModelProto, x: hm.Array) -> hm.Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.astype(np.float32)})[0])


def filled(value: int) -> hm.Array:
    return np.full((1, 2, 8, 8), value, np.float32)


CASES: dict[str, tuple[onnx.NodeProto, float, float, hm.Array]] = {
    # 128 steps of both are taken off as one rounded number: 0 + 0 is not 0 any more.
    "add": (hm.node("Add", ["v", "v2"], "y"), 255.9, 1.7e7, filled(0)),
    "mul": (hm.node("Mul", ["v", "v"], "y"), 2**15 - 1, 2**18, filled(127)),
    "average": (hm.node("AveragePool", ["v"], "y", kernel_shape=[3, 3]), 2**22 - 1, 2**25, filled(127)),
    "global": (hm.node("GlobalAveragePool", ["v"], "y"), 255.9, 2**15, filled(127)),
    "small global": (hm.node("GlobalAveragePool", ["v"], "y"), 2**-15, 2**-30, filled(127)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_ratio_beyond_the_kernel_is_refused(name: str) -> None:
    node, inside, outside, x = CASES[name]
    good, bad = (quantized(node, {}, own_step=1 / ratio) for ratio in (inside, outside))
    check_ranges(good)
    assert np.array_equal(optimised(good, x), hm.answers(good, x)[0])
    with pytest.raises(ExportError, match=f"^{node.name}: one step of what enters is"):
        check_ranges(bad)
    if ON_X86:
        try:
            assert not np.array_equal(optimised(bad, x), hm.answers(bad, x)[0])
        except Exception as error:  # onnxruntime's own exception types share no base below Exception
            if isinstance(error, AssertionError):
                raise
            assert "out of computation range" in str(error)


def layer(*, bias: int, ratio: float) -> onnx.ModelProto:
    """A layer of two channels a and b: 3 a - b + bias."""
    constants: dict[str, hm.Constant] = {
        "w": np.array([3, -1], np.int8).reshape(1, 2, 1, 1),
        "ws": np.float32(0.7),
        "b": np.array([bias], np.int32),
        "bs": np.float32(0.1 * 0.7),
    }
    return quantized(hm.node("Conv", ["v", "wv", "bv"], "y"), constants, own_step=0.1 * 0.7 / ratio, step=0.1)


def test_an_accumulator_that_passes_int32_is_refused() -> None:
    x = filled(1)
    good, bad = (layer(bias=bias, ratio=2**-24) for bias in (2**31 - 1 - 4 * 255, 2**31 - 1))
    check_ranges(good)
    assert optimised(good, x).min() == 127  # clipped to the last code
    assert optimised(bad, x).max() == -128  # past int32, and so the first
    with pytest.raises(ExportError, match=r"^y_conv: its sums can reach 2\.1e\+09, and int32 holds"):
        check_ranges(bad)


def test_a_sum_that_floats_cannot_tell_from_0_is_refused() -> None:
    x = filled(1) * 0.1
    x[:, 1] *= 3  # 3 * 1 - 3 = 0: of codes 0, of floats what rounding leaves of 0.1 * 2.1 - 0.3 * 0.7
    good, bad = (layer(bias=0, ratio=ratio) for ratio in (2**21, 2**26))
    check_ranges(good)
    assert (optimised(bad, x) == 0).all()
    assert (hm.answers(bad, x)[0] != 0).any()
    with pytest.raises(ExportError, match=r"^y_conv: its largest sum is 6\.8e\+10 steps of the quantizer behind it"):
        check_ranges(bad)
