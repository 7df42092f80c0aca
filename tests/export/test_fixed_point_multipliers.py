"""The pass that writes a QONNX graph for hls4ml, against closed forms; hls4ml's own C simulation in the slow test."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robustq.errors import ExportError
from robustq.export.formats import build
from robustq.export.lowering.fixed_point_multipliers import CHANNELS_LAST, FRACTION, fixed_point_multipliers
from robustq.export.qonnx_file import execute
from tests.export import hand_made as hm
from tests.export.exported import net, parsed
from tests.export.test_custom_networks import X, spec
from tests.models.fx.custom_nets import folded_of
from tests.models.small_nets import small_spec

STEP, BRANCH, SUM, BIAS_STEP = 0.3, 0.017, 0.41, 0.0007
WEIGHT_STEPS = np.array([0.05, 0.113, 1e-4, 0.02], np.float32)  # the third channel has no weights
WEIGHTS = np.array([[3, -7], [-5, 6], [0, 0], [7, 7]], np.float32)
BIASES = np.round(np.array([0.9, -0.3, 0.77, -2.1]) / BIAS_STEP) * BIAS_STEP
LAST, LAST_STEP = np.array([[7, -3, 2, 5], [-4, 1, 6, -7], [1, 2, 3, 4]], np.float32), 0.031


def quant(x: str, y: str, scale: Any, bits: int, constants: dict[str, Any], *, signed: int = 1) -> onnx.NodeProto:
    parameters = {f"{y}_scale": scale, f"{y}_zero": 0.0, f"{y}_bits": bits}
    constants |= {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    domain = "qonnx.custom_op.general"
    options: dict[str, Any] = {"signed": signed, "narrow": 0, "rounding_mode": "ROUND"}
    return helper.make_node("Quant", [x, *parameters], [y], name=y, domain=domain, **options)


def made(nodes: list[onnx.NodeProto], constants: dict[str, Any], *, channels: int, side: int = 1) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "hand_made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("qonnx.custom_op.general", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def residual(*, other_branch: float) -> onnx.ModelProto:
    """A convolution of two channels, quantized twice, with its own sum and ReLU, and a linear layer behind."""
    wide = (-1, 1, 1, 1)
    constants: dict[str, Any] = {
        "w": (WEIGHTS * WEIGHT_STEPS[:, None]).reshape(4, 2, 1, 1),
        "b": BIASES,
        "w_last": LAST * LAST_STEP,
    }
    nodes = [
        quant("x", "codes", STEP, 4, constants, signed=0),
        quant("w", "w_q", WEIGHT_STEPS.reshape(wide), 4, constants),
        quant("b", "b_q", BIAS_STEP, 32, constants),
        hm.node("Conv", ["codes", "w_q", "b_q"], "sums", kernel_shape=[1, 1]),
        quant("sums", "left", BRANCH, 8, constants),
        quant("sums", "right", other_branch, 8, constants),
        hm.node("Add", ["left", "right"], "added"),
        hm.node("Relu", ["added"], "positive"),
        quant("positive", "out", SUM, 4, constants, signed=0),
        hm.node("Flatten", ["out"], "flat", axis=1),
        quant("w_last", "w_last_q", LAST_STEP, 4, constants),
        hm.node("Gemm", ["flat", "w_last_q"], "y", transB=1),
    ]
    return made(nodes, constants, channels=2)


def rounded(values: hm.Array, step: float, low: int, high: int) -> tuple[hm.Array, hm.Array]:
    """Quantized values, and how far each lies from a rounding boundary, in steps."""
    position = values / np.float32(step).astype(np.float64)
    return np.clip(np.rint(position), low, high) * step, np.abs(position - np.floor(position) - 0.5)


@pytest.mark.parametrize(("other_branch", "products"), [(BRANCH, 0), (0.029, 2)])
def test_logits_are_those_of_the_closed_form(other_branch: float, products: int) -> None:
    model = residual(other_branch=other_branch)
    fixed_point_multipliers(model)
    into_sums = [node.input for node in model.graph.node if node.op_type == "Add"]
    assert sum(name.endswith("_product") for inputs in into_sums for name in inputs) == products
    pairs = np.stack(np.meshgrid(np.arange(16), np.arange(16)), axis=-1).reshape(-1, 2)
    weight = WEIGHTS.astype(np.float64) * WEIGHT_STEPS[:, None].astype(np.float64)
    sums = STEP * pairs @ weight.T + BIASES
    left, near_left = rounded(sums, BRANCH, -128, 127)
    right, near_right = rounded(sums, other_branch, -128, 127)
    out, near_out = rounded(left + right, SUM, 0, 15)
    expected = out @ (LAST.astype(np.float64) * LAST_STEP).T
    clear = np.min([near_left, near_right, near_out], axis=(0, 2)) > 4 * 2.0**-FRACTION
    assert clear.mean() > 0.9
    x = torch.from_numpy(pairs * STEP).float().reshape(-1, 2, 1, 1)
    found = execute(model, x).numpy()
    bound = 15 * SUM * LAST_STEP * np.abs(LAST).sum(axis=1).max()
    assert np.abs(found - expected)[clear].max() < bound * 2.0**-FRACTION


@pytest.mark.parametrize("step", [0.41, 0.47])
def test_no_product_is_by_one(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both inputs of the sum come to the step of the quantizer behind it, for some steps but for a float64 rounding;
    hls4ml drops a product by 1 together with the quantizer behind it.
    """
    monkeypatch.setitem(globals(), "SUM", step)
    model = residual(other_branch=0.029)
    fixed_point_multipliers(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    multipliers = [values for name, values in constants.items() if name.endswith("_multiplier")]
    assert len(multipliers) == 6 and not any((values == 1).all() for values in multipliers)


def test_every_type_is_written_in_the_graph() -> None:
    """Integer codes, powers of two, constants on their grids, one layout, all shapes."""
    model = copy.deepcopy(parsed(4, "qonnx"))
    fixed_point_multipliers(model)
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {value.name for value in [*graph.value_info, *graph.input, *graph.output]}
    layers = ["Conv"] * 11 + ["Add"] * 3  # nine convolutions, the pooling and the linear layer
    ends = ["Flatten", "Transpose"]
    assert sorted(one.op_type for one in graph.node if one.op_type not in ("Quant", "Mul")) == sorted(layers + ends)
    for node in graph.node:
        assert {*node.input, *node.output} <= shapes and node.name.isidentifier()
        assert node.op_type != "Conv" or node.domain == CHANNELS_LAST
        if node.op_type != "Quant":
            continue
        scale, zero_point, width = (float(values[name]) for name in node.input[1:])
        fraction, _ = np.frexp(scale)
        assert fraction == 0.5 and zero_point == 0
        if node.input[0] not in values:
            assert scale == 1
            continue
        codes = values[node.input[0]].astype(np.float64) / scale
        signed = next(one.i for one in node.attribute if one.name == "signed")
        assert (codes == np.rint(codes)).all() and codes.ndim in (0, 1, 4)
        assert -signed * 2 ** (width - 1) <= codes.min() and codes.max() < 2 ** (width - signed)
        assert codes.ndim != 4 or (scale == 1 and width <= 8)


@pytest.mark.parametrize("name", ["resnet8", "inverted"])
def test_answers_are_the_folded_networks(name: str) -> None:
    folded, x, kind = (
        (net(4).folded, net(4).x[:20], small_spec(4)) if name == "resnet8" else (folded_of(name, 4), X[:20], spec(4))
    )
    model = build("qonnx", folded, kind, consumer="hls4ml")
    with torch.no_grad():
        expected = folded(x)
    assert (execute(model, x) - expected).abs().max() < 2e-5 * (expected.max() - expected.min())


def refused(kind: str, **options: Any) -> onnx.ModelProto:
    """Quantized codes of four channels and 4 x 4 pixels, an operator, and the logits."""
    constants: dict[str, Any] = {"w": np.ones((4, options.pop("inner", 4), 3, 3))}
    inputs = {"Conv": ["codes", "w_q"], "Concat": ["codes", "codes"]}.get(kind, ["codes"])
    nodes = [
        quant("x", "codes", STEP, 4, constants, signed=0),
        quant("w", "w_q", 1.0, 4, constants),
        helper.make_node(kind, inputs, ["y"], name="operator", **options),
    ]
    return made(nodes, constants, channels=4, side=4)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("Concat", {"axis": 1}, "is none of Quant, Conv, Gemm, Relu, MaxPool, GlobalAveragePool, Add, Flatten"),
        ("Conv", {"group": 2, "inner": 2}, "has 2 groups; hls4ml takes convolutions of one, and depthwise ones"),
        ("Conv", {"auto_pad": "SAME_UPPER"}, "is padded by auto_pad or dilated"),
        ("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4}, "is padded, dilated or rounds its size up"),
    ],
)
def test_what_hls4ml_cannot_hold_is_named(kind: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ExportError) as caught:
        fixed_point_multipliers(refused(kind, **options))
    line = f"hls4ml cannot hold operator ({kind}), which {why}; write the network with --format integer"
    assert str(caught.value) == line


PINS = """
    h5py==3.16.0 hls4ml==1.3.0 ml-dtypes==0.6.0 numpy==2.4.6 onnx==1.23.2 protobuf==7.36.2 pydigitalwavetools==1.1
    pyyaml==6.0.4 quantizers==1.2.2 typing-extensions==4.16.0
"""


@pytest.mark.slow
def test_hls4mls_c_simulation_gives_the_executors_logits(tmp_path: Path) -> None:
    """Depthwise layers, a signed sum and three channels; the quickstart's network is in docs/results/hls4ml.md."""
    model, x = build("qonnx", folded_of("inverted", 4), spec(4), consumer="hls4ml"), X[:20]
    onnx.save(model, tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", x.numpy())
    python = tmp_path / "hls4ml" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "hls4ml"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PINS.split()], check=True)
    runner = Path(__file__).parents[2] / "benchmarks" / "runners" / "run_hls4ml.py"
    files = [tmp_path / name for name in ("model.onnx", "images.npy", "logits.npy")]
    ran = subprocess.run([python, runner, *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"version": "hls4ml 1.3.0", "integer_layers": 7, "float_layers": None}
    found = torch.from_numpy(np.load(files[-1]))
    expected = execute(model, x)
    assert (found - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
