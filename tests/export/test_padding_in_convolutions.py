"""The pass that moves zero padding into the convolutions behind it."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest

from robustq.export.lowering.pads import padding_in_convolutions
from tests.export import hand_made as hm

TOP, LEFT, BOTTOM, RIGHT = 1, 2, 3, 0


def padded(
    amounts: list[int], *, readers: int = 1, value: float = 0.0, mode: str = "constant", other: bool = False
) -> onnx.ModelProto:
    """Pad - Conv (as many as ``readers``, the first with pads of its own), and perhaps another reader."""
    draw = np.random.default_rng(0)
    constants = {
        "amounts": np.array(amounts, np.int64),
        "value": np.float32(value),
        "w": draw.standard_normal((3, 2, 3, 3)).astype(np.float32),
    }
    nodes = [hm.node("Pad", ["x", "amounts", "value"], "padded", mode=mode)]
    for number in range(readers):
        own = {"pads": [1, 1, 2, 2]} if number == 0 else {}
        nodes.append(hm.node("Conv", ["padded", "w"], f"y{number}", **own))
    outputs = {f"y{number}": 4 for number in range(readers)}
    if other:
        nodes.append(hm.node("Relu", ["padded"], "z"))
        outputs["z"] = 4
    return hm.model(nodes, constants, x=["n", 2, 5, 6], outputs=outputs)


def images() -> hm.Array:
    return np.random.default_rng(1).standard_normal((4, 2, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("readers", [1, 2])
def test_height_and_width_go_into_the_convolutions(readers: int) -> None:
    before = padded([0, 0, TOP, LEFT, 0, 0, BOTTOM, RIGHT], readers=readers)
    after = copy.deepcopy(before)
    assert padding_in_convolutions(after) == readers
    onnx.checker.check_model(after, full_check=True)
    assert hm.counts(after) == {"Conv": readers}
    pads = [list(one.ints) for node in after.graph.node for one in node.attribute if one.name == "pads"]
    assert pads == [[2, 3, 5, 2], [TOP, LEFT, BOTTOM, RIGHT]][:readers]
    assert hm.same_answers(before, after, images())
    assert padding_in_convolutions(after) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"amounts": [0, 0, 1, 1, 0, 0, 1, 1], "value": 0.5},
        {"amounts": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"},
        {"amounts": [0, 0, -1, 0, 0, 0, 0, 0]},
        {"amounts": [0, 0, 1, 1, 0, 0, 1, 1], "other": True},
    ],
)
def test_other_padding_stays(options: dict[str, object]) -> None:
    model = padded(**options)  # type: ignore[arg-type]
    before = model.SerializeToString()
    assert padding_in_convolutions(model) == 0
    assert model.SerializeToString() == before


def test_padded_channels_stay() -> None:
    constants = {"amounts": np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64), "w": np.ones((3, 3, 3, 3), np.float32)}
    nodes = [hm.node("Pad", ["x", "amounts"], "padded"), hm.node("Conv", ["padded", "w"], "y")]
    model = hm.model(nodes, constants, x=["n", 2, 5, 6], outputs={"y": 4})
    assert padding_in_convolutions(model) == 0
