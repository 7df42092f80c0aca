"""What FINN's conversion needs of the quantizers of biases."""

from __future__ import annotations

import onnx
import pytest

from robustq.export.lowering.zero_points import bias_zero_points
from tests.export import hand_made as hm
from tests.export.exported import parsed


def bias_quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    made_by = {name: node for node in model.graph.node for name in node.output}
    return [made_by[node.input[2]] for node in model.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_scales_and_zero_points_of_biases_have_one_axis(bits: int) -> None:
    model = parsed(bits, "qonnx")
    found = bias_quantizers(model)
    assert len(found) == 9
    for node in found:
        assert hm.constant(model, node.input[1]).ndim == 1
        assert hm.constant(model, node.input[2]).shape == (1,) and hm.constant(model, node.input[2])[0] == 0


def test_a_scalar_that_others_read_stays_theirs() -> None:
    model = parsed(4, "qonnx")
    (first, *_) = bias_quantizers(model)
    others = [node for node in model.graph.node if node.op_type == "Quant" and node.output[0] != first.output[0]]
    scalar = next(node.input[2] for node in others if hm.constant(model, node.input[2]).ndim == 0)
    first.input[2] = scalar
    assert bias_zero_points(model) == 1
    assert hm.constant(model, first.input[2]).shape == (1,)
    assert hm.constant(model, scalar).ndim == 0
    assert bias_zero_points(model) == 0
