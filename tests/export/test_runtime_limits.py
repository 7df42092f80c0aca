"""The table of runtimes that a file is not for, on files of every format."""

from __future__ import annotations

import copy

import onnx
import pytest
from onnx import TensorProto, helper

from robustq.export.formats import HLS4ML, build
from robustq.export.runtime_limits import contents, not_for
from tests.export.exported import SLOW_WIDTH, net, parsed

OLD = "onnxruntime up to 1.20.1, also -web and -node"
WEB = "onnxruntime-web 1.30.0 with graph optimisation"
BFLOAT16 = "OpenVINO at its default setting, on processors that compute bfloat16"
OPENVINO = "OpenVINO at any setting"

EXPECTED = {
    ("qcdq", 4): [BFLOAT16],
    ("qcdq", 3): [BFLOAT16],
    ("qcdq", 1): [OPENVINO],
    ("integer", 4): [BFLOAT16],
    ("integer", 3): [BFLOAT16],
    ("integer", 1): [OLD, WEB, OPENVINO],
    ("packed", 4): [BFLOAT16],
    ("packed", 3): [BFLOAT16],
    ("packed", 1): [OLD, WEB, OPENVINO],
    ("qonnx", 4): ["onnxruntime", "hls4ml"],
    ("qonnx", 1): ["onnxruntime", "hls4ml"],
    ("float", 32): [],
}


def runtimes(sentences: list[str]) -> list[str]:
    return [one.split(": ", 1)[0] for one in sentences]


CASES = [pytest.param(*case, marks=pytest.mark.slow if case[1] == SLOW_WIDTH else ()) for case in EXPECTED]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_runtimes_that_a_file_is_not_for(name: str, bits: int) -> None:
    assert runtimes(not_for(parsed(bits, name), net(bits).spec)) == EXPECTED[name, bits]


def test_a_file_for_hls4ml() -> None:
    made = net(4)
    model = build("qonnx", made.folded, made.spec, consumer=HLS4ML)
    assert runtimes(not_for(model, made.spec, consumer=HLS4ML)) == ["onnxruntime", "FINN"]


@pytest.mark.parametrize("name", ["integer", "packed"])
def test_element_types_decide_and_not_the_format(name: str) -> None:
    """The same comparisons of int32 load everywhere."""
    model = copy.deepcopy(parsed(1, name))
    nodes = model.graph.node
    for less in [node for node in nodes if node.op_type == "Less"]:
        wide = [f"{one}_wide_{less.output[0]}" for one in less.input]
        for read, made in zip(less.input, wide, strict=True):
            at = list(nodes).index(less)
            nodes.insert(at, helper.make_node("Cast", [read], [made], to=TensorProto.INT32))
        changed = next(node for node in nodes if node.op_type == "Less" and node.output == less.output)
        changed.input[:] = wide
    onnx.checker.check_model(model, full_check=True)
    assert "Less" in contents(model, net(1).spec).operators
    assert runtimes(not_for(model, net(1).spec)) == [OPENVINO]


@pytest.mark.parametrize("bits", [4, pytest.param(SLOW_WIDTH, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", ["integer", "packed"])
def test_no_sum_of_bytes_is_written(name: str, bits: int) -> None:
    """The table has no row for it, though onnxruntime before 1.23 would refuse such a file."""
    found = contents(parsed(bits, name), net(bits).spec)
    assert "Add" in found.operators and "Add" not in found.of_bytes
    assert {"DequantizeLinear"} <= found.of_bytes
