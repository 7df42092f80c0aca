"""Layout and pixel range that a file states by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from robustq.twin.graph import graph_of
from robustq.twin.inputs import Stated, stated_form


def model(
    *operators: tuple[str, list[Any]], shape: tuple[Any, ...] = ("n", 3, 8, 8), kind: int = TensorProto.FLOAT
) -> ModelProto:
    """Nodes in a row, each with constants as its further inputs."""
    nodes, constants, name = [], [], "x"
    for number, (operator, values) in enumerate(operators):
        names = [f"constant{number}.{place}" for place in range(len(values))]
        constants += [numpy_helper.from_array(np.asarray(one), label) for one, label in zip(values, names, strict=True)]
        options: dict[str, Any] = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
        nodes.append(helper.make_node(operator, [name, *names], [f"y{number}"], **options))
        name = f"y{number}"
    ends = [
        helper.make_tensor_value_info("x", kind, shape),
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None),
    ]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))


def single(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)


MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
FIRST = "its first nodes"


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        ([("Relu", [])], None),
        ([("Div", [single(255)])], "uint8"),
        ([("Mul", [single(1 / 255)]), ("Relu", [])], "uint8"),
        ([("Mul", [single(2)])], None),
        ([("Identity", []), ("Sub", [MEAN]), ("Relu", [])], "unit"),
        ([("Sub", [255 * MEAN])], "uint8"),
        ([("Sub", [single(-0.5)])], None),
        ([("QuantizeLinear", [single(1 / 255), np.array(0, np.uint8)])], "unit"),
        ([("QuantizeLinear", [single(1 / 255), np.array(-128, np.int8)])], "unit"),
        ([("QuantizeLinear", [single(1), np.array(0, np.uint8)])], "uint8"),
        ([("QuantizeLinear", [single(2 / 255), np.array(128, np.uint8)])], None),  # -1 to 1: normalised
        ([("QuantizeLinear", [np.full(3, 1 / 255, np.float32), np.zeros(3, np.uint8)])], None),
    ],
)
def test_the_first_node_shows_the_range(operators: list[tuple[str, list[Any]]], expected: str | None) -> None:
    found = stated_form(graph_of(model(*operators)))
    assert found == Stated("nchw", expected, "" if expected is None else FIRST)


def test_type_metadata_and_layout() -> None:
    pixels = model(("Cast", []), shape=(1, 8, 8, 3), kind=TensorProto.UINT8)
    assert stated_form(graph_of(pixels)) == Stated("nhwc", "uint8", "its type")
    assert stated_form(graph_of(model(("Relu", []), shape=("n", 4, 8, 3)))).layout is None
    for text, expected in (("NominalRange_0_255", "uint8"), ("Normalized_1_1", "0.5/0.5"), ("other", None)):
        named = model(("Relu", []))
        named.metadata_props.add(key="Image.NominalPixelRange", value=text)
        assert stated_form(graph_of(named)).pixels == expected
