"""Files with int8 codes and zero point 0 alone give the answers of their network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from robustq.errors import UsageError
from robustq.export.formats import TENSORRT, build, check_format
from robustq.export.parity import bound_of, compare, logits_of
from robustq.export.session import OnnxModel
from tests.export.exported import net


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_answers_and_codes(tmp_path: Path, bits: int) -> None:
    made = net(bits)
    model = build("qcdq", made.folded, made.spec, consumer=TENSORRT)
    onnx.checker.check_model(model, full_check=True)
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    quantizers = [one for one in model.graph.node if one.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) > 20
    for node in quantizers:
        if len(node.input) > 2:
            assert stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any()
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            assert stored[node.input[0]].dtype == np.int8
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    pairs = [makers[node.input[0]] for node in quantizers if node.op_type[0] == "D" and node.input[0] in makers]
    assert set(pairs) == {"QuantizeLinear"}  # no Clip between the two
    file = tmp_path / "net.onnx"
    onnx.save(model, file)
    expected = logits_of(made.folded, made.x, label="PyTorch")
    for optimise in (True, False):
        answers = logits_of(OnnxModel(file, optimise=optimise), made.x, label="file")
        found = compare(expected, answers, bound=bound_of(made.spec))
        assert found.different_top1 == 0 and found.mean_difference <= (1e-3 if bits == 8 else 1e-4)


def test_other_formats_have_no_such_form() -> None:
    with pytest.raises(UsageError, match="--for tensorrt is not known; choose finn or hls4ml"):
        check_format("integer", net(4).spec, consumer=TENSORRT)
