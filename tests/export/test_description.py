"""Widths read from weights as they lie in a file: hand-made layers whose width is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robustq.export.description import describe_onnx


def layer_file(path: Path, codes: Any, *, kind: str, transposed: bool = False) -> Path:
    """One layer whose weight is DequantizeLinear of ``codes`` (int8)."""
    weight = np.array(codes, np.int8)
    if kind == "Conv":
        weight = weight[:, :, None, None]
    initializers = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    options: dict[str, Any] = {"transB": 1} if kind == "Gemm" and transposed else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["dequantized"]),
        helper.make_node(kind, ["x", "dequantized"], ["y"], name="layer", **options),
    ]
    channels = weight.shape[:2] if kind == "Conv" or transposed else weight.shape[::-1]
    pixels = [4, 4] if kind == "Conv" else []
    answered, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", count, *pixels])
        for name, count in zip("yx", channels, strict=True)
    )
    graph = helper.make_graph(nodes, "g", [given], [answered], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        ([[7, -8], [1, 0]], 4),
        ([[8, 0], [1, 0]], 2),  # one channel is 8 times (1, 0): the other decides nothing more
        ([[8, 3], [1, 0]], 5),
        ([[1, -1], [-1, -1]], 1),
        ([[112, -16], [9, -63]], 4),  # 16 x (7, -1) and 9 x (1, -7), as folding writes 4-bit weights
        ([[127, -126], [0, 0]], 8),
    ],
)
@pytest.mark.parametrize(("kind", "transposed"), [("Conv", False), ("Gemm", True), ("Gemm", False), ("MatMul", False)])
def test_the_width_is_what_a_channel_needs(
    tmp_path: Path, codes: list[list[int]], bits: int, kind: str, transposed: bool
) -> None:
    by_channel = codes if kind == "Conv" or transposed else np.array(codes).T
    found = describe_onnx(layer_file(tmp_path / "m.onnx", by_channel, kind=kind, transposed=transposed))
    (layer,) = found["layers"]
    assert (layer["name"], layer["kind"], layer["weight_bits"]) == ("layer", kind, bits)


def test_the_rest_of_a_file(tmp_path: Path) -> None:
    found = describe_onnx(layer_file(tmp_path / "m.onnx", [[1, 2], [3, 4]], kind="MatMul"))
    assert found["inputs"] == [{"name": "x", "type": "FLOAT", "shape": ["n", 2]}]
    assert found["operators"] == {"DequantizeLinear": 1, "MatMul": 1}
    assert found["opset"] == {"ai.onnx": 17}
    assert (found["format"], found["spec"]) == (None, None)
