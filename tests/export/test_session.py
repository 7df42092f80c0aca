"""A file in onnxruntime: its answers, and which of its layers run as integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from robustq.errors import ModelFileError
from robustq.export.integer_layers import optimised_layers
from robustq.export.session import OnnxModel
from tests.export import hand_made as hm
from tests.export.exported import exported


def constants() -> dict[str, hm.Constant]:
    draw = np.random.default_rng(0)
    return {
        "s": np.float32(1 / 255),
        "z": np.uint8(0),
        "w_codes": draw.integers(-127, 128, (4, 1, 3, 3)).astype(np.int8),
        "w_s": np.float32(0.01),
        "w_z": np.int8(0),
        "mid_s": np.float32(0.02),
        "mid_z": np.uint8(128),
        "v": draw.standard_normal((5, 4, 3, 3)).astype(np.float32),
    }


def half_integer() -> onnx.ModelProto:
    """A quantized convolution, a float one, global pooling in float, Flatten: (N, 1, 6, 6) -> (N, 5)."""
    nodes = [
        hm.quantize("x", "codes", "s", "z"),
        hm.dequantize("codes", "values", "s", "z"),
        hm.dequantize("w_codes", "w", "w_s", "w_z"),
        onnx.helper.make_node("Conv", ["values", "w"], ["mid"], name="quantized_conv"),
        hm.quantize("mid", "mid_codes", "mid_s", "mid_z"),
        hm.dequantize("mid_codes", "mid_values", "mid_s", "mid_z"),
        onnx.helper.make_node("Conv", ["mid_values", "v"], ["out"], name="float_conv"),
        hm.node("GlobalAveragePool", ["out"], "pooled"),
        hm.node("Flatten", ["pooled"], "y"),
    ]
    return hm.model(nodes, constants(), x=["n", 1, 6, 6], outputs={"y": 2})


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def expected(x: torch.Tensor) -> torch.Tensor:
    """The same arithmetic in torch."""
    c = {name: torch.from_numpy(np.asarray(value)).float() for name, value in constants().items()}
    x = (x / c["s"]).round().clamp(0, 255) * c["s"]
    mid = functional.conv2d(x, c["w_codes"] * c["w_s"])
    mid = ((mid / c["mid_s"]).round().clamp(-128, 127)) * c["mid_s"]
    return functional.conv2d(mid, c["v"]).mean(dim=(2, 3))


def test_integer_and_float_layers_are_told_apart(tmp_path: Path) -> None:
    layers = optimised_layers(saved(tmp_path, half_integer()))
    assert len(layers.integer) == 1 and "quantized_conv" in layers.integer[0]
    # Where onnxruntime changes the layout of a float convolution, it names the new node after the output.
    (convolution,) = layers.float_convolutions
    assert "float_conv" in convolution or "out" in convolution
    assert set(layers.float_convolutions) < set(layers.in_float)
    assert len(layers.in_float) == 2  # and the pooling


def test_a_convolution_that_is_fused_with_its_relu_is_a_float_convolution(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(np.float32)
    conv = onnx.helper.make_node("Conv", ["x", "w"], ["sums"], name="grouped", group=2)
    nodes = [conv, hm.node("Relu", ["sums"], "y")]
    path = saved(tmp_path, hm.model(nodes, {"w": weights}, x=["n", 6, 8, 8], outputs={"y": 4}))
    assert optimised_layers(path).float_convolutions == ("grouped",)  # FusedConv


@pytest.mark.parametrize(("optimise", "exact"), [(False, False), (True, False), (True, True)])
def test_answers_are_the_graphs(tmp_path: Path, optimise: bool, exact: bool) -> None:
    x = torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model = OnnxModel(saved(tmp_path, half_integer()), optimise=optimise, exact=exact, threads=1)
    logits = model(x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_())  # may lie anyhow in memory
    assert logits.dtype == torch.float32 and logits.device.type == "cpu" and not logits.requires_grad
    # One mid code on the other side of a tie moves a mean of 16 values by at most 9 * 4 * 0.02 * 3 / 16.
    torch.testing.assert_close(logits, expected(x), rtol=0, atol=0.15)
    if not optimise:
        torch.testing.assert_close(logits, expected(x), rtol=0, atol=1e-4)  # float32 sums of 36 products


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(1000), None, "qonnx", "truncated"])
@pytest.mark.parametrize("read", [OnnxModel, optimised_layers])
def test_a_file_that_does_not_load_is_one_line(tmp_path: Path, content: bytes | str | None, read: type) -> None:
    path = tmp_path / "model.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "qonnx":
        path.write_bytes(exported(4, "qonnx"))
    elif content == "truncated":
        path.write_bytes(half_integer().SerializeToString()[:-50])
    with pytest.raises(ModelFileError) as caught:
        read(path)
    reason = "cannot be read" if content is None else "onnxruntime cannot load it"
    assert str(caught.value).startswith(f"{path}: {reason} (")
    assert "\n" not in str(caught.value)
