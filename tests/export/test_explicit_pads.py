"""The pass that writes down how much a convolution pads."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from robustq.errors import ExportError
from robustq.export.lowering.pads import explicit_pads
from tests.export import hand_made as hm


def convolution(kernel: list[int], **attributes: object) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((3, 2, *kernel)).astype(np.float32)
    node = hm.node("Conv", ["x", "w"], "y", kernel_shape=kernel, **attributes)
    return hm.model([node], {"w": weight}, x=["n", 2, 9, 8], outputs={"y": 4})


@pytest.mark.parametrize("kernel", [[3, 3], [4, 4], [2, 5], [1, 2]])
@pytest.mark.parametrize("dilations", [[1, 1], [2, 3]])
def test_same_pads_as_pytorch_does(kernel: list[int], dilations: list[int]) -> None:
    model = convolution(kernel, dilations=dilations, auto_pad="SAME_UPPER")
    assert explicit_pads(model) == 1
    assert {one.name for one in model.graph.node[0].attribute} == {"kernel_shape", "dilations", "pads"}
    x = np.random.default_rng(1).standard_normal((4, 2, 9, 8)).astype(np.float32)
    weight = torch.from_numpy(hm.constant(model, "w").copy())
    expected = functional.conv2d(torch.from_numpy(x), weight, padding="same", dilation=dilations).numpy()
    np.testing.assert_allclose(hm.answers(model, x)[0], expected, atol=1e-5, rtol=0)  # 50 products in float32
    assert explicit_pads(model) == 0


def test_valid_pads_nothing() -> None:
    before = convolution([3, 3], auto_pad="VALID", strides=[2, 2])
    after = copy.deepcopy(before)
    assert explicit_pads(after) == 1
    assert hm.same_answers(before, after, np.random.default_rng(1).standard_normal((4, 2, 9, 8)))


@pytest.mark.parametrize(
    "attributes", [{"auto_pad": "SAME_LOWER"}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}], ids=str
)
def test_pads_that_pytorch_never_writes_are_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(ExportError, match=r"y_conv: pads by SAME_(LOWER|UPPER)"):
        explicit_pads(convolution([3, 3], **attributes))
