"""Padding of convolutions, against PyTorch and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from robustq.errors import ExportError
from robustq.export.lowering.pads import explicit_pads, padding_in_convolutions
from tests.export import hand_made as hm


def convolution(kernel: list[int], **attributes: object) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((3, 2, *kernel)).astype(np.float32)
    node = hm.node("Conv", ["x", "w"], "y", kernel_shape=kernel, **attributes)
    return hm.model([node], {"w": weight}, x=["n", 2, 9, 8], outputs={"y": 4})


@pytest.mark.parametrize("kernel", [[3, 3], [4, 4], [2, 5], [1, 2]])
@pytest.mark.parametrize("dilations", [[1, 1], [2, 3]])
def test_same_pads_as_pytorch_does(kernel: list[int], dilations: list[int]) -> None:
    model = hm.lowered(explicit_pads, convolution(kernel, dilations=dilations, auto_pad="SAME_UPPER"), count=1)
    assert {one.name for one in model.graph.node[0].attribute} == {"kernel_shape", "dilations", "pads"}
    x = np.random.default_rng(1).standard_normal((4, 2, 9, 8)).astype(np.float32)
    weight = torch.from_numpy(hm.constant(model, "w").copy())
    expected = functional.conv2d(torch.from_numpy(x), weight, padding="same", dilation=dilations).numpy()
    np.testing.assert_allclose(hm.answers(model, x)[0], expected, atol=1e-5, rtol=0)  # 50 products in float32


def test_valid_pads_nothing() -> None:
    x = np.random.default_rng(1).standard_normal((4, 2, 9, 8))
    hm.lowered(explicit_pads, convolution([3, 3], auto_pad="VALID", strides=[2, 2]), x, count=1)


@pytest.mark.parametrize(
    "attributes", [{"auto_pad": "SAME_LOWER"}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}], ids=str
)
def test_pads_that_pytorch_never_writes_are_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(ExportError, match=r"y_conv: pads by SAME_(LOWER|UPPER)"):
        explicit_pads(convolution([3, 3], **attributes))


def padded(
    amounts: list[int], *, readers: int = 1, value: float = 0.0, mode: str = "constant", other: bool = False
) -> onnx.ModelProto:
    """Pad - Conv (as many as ``readers``, the first with pads of its own), and perhaps another reader."""
    weight = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)
    constants = {"amounts": np.array(amounts, np.int64), "value": np.float32(value), "w": weight}
    nodes = [hm.node("Pad", ["x", "amounts", "value"], "padded", mode=mode)]
    for number in range(readers):
        nodes.append(hm.node("Conv", ["padded", "w"], f"y{number}", **({} if number else {"pads": [1, 1, 2, 2]})))
    outputs = {f"y{number}": 4 for number in range(readers)}
    if other:
        nodes.append(hm.node("Relu", ["padded"], "z"))
        outputs["z"] = 4
    return hm.model(nodes, constants, x=["n", 2, 5, 6], outputs=outputs)


def test_height_and_width_go_into_the_convolutions() -> None:
    x = np.random.default_rng(1).standard_normal((4, 2, 5, 6)).astype(np.float32)
    after = hm.lowered(padding_in_convolutions, padded([0, 0, 1, 2, 0, 0, 3, 0], readers=2), x, count=2)
    assert hm.counts(after) == {"Conv": 2}
    pads = [list(one.ints) for node in after.graph.node for one in node.attribute if one.name == "pads"]
    assert pads == [[2, 3, 5, 2], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("amounts", "options"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], {"value": 0.5}),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "reflect"}),
        ([0, 0, -1, 0, 0, 0, 0, 0], {}),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"other": True}),
    ],
)
def test_other_padding_stays(amounts: list[int], options: dict[str, object]) -> None:
    assert hm.unchanged(padding_in_convolutions, padded(amounts, **options))  # type: ignore[arg-type]


def test_padded_channels_stay() -> None:
    constants = {"amounts": np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64), "w": np.ones((3, 3, 3, 3), np.float32)}
    nodes = [hm.node("Pad", ["x", "amounts"], "padded"), hm.node("Conv", ["padded", "w"], "y")]
    assert hm.unchanged(padding_in_convolutions, hm.model(nodes, constants, x=["n", 2, 5, 6], outputs={"y": 4}))
