"""The runtimes that a file is not for, and its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from robustq.export.formats import HLS4ML, build
from robustq.export.metadata import add_results
from robustq.export.runtime_limits import not_for
from tests.export.exported import net, parsed, written

OLD = "onnxruntime up to 1.20.1, also -web and -node"
WEB = "onnxruntime-web 1.30.0 with graph optimisation"
BFLOAT16 = "OpenVINO at its default setting, on processors that compute bfloat16"
OPENVINO = "OpenVINO at any setting"

EXPECTED = {
    ("qcdq", 4): [BFLOAT16],
    ("qcdq", 1): [OPENVINO],
    ("integer", 4): [BFLOAT16],
    ("integer", 1): [OLD, WEB, OPENVINO],
    ("packed", 4): [BFLOAT16],
    ("packed", 1): [OLD, WEB, OPENVINO],
    ("qonnx", 4): ["onnxruntime", "hls4ml"],
    ("qonnx", 1): ["onnxruntime", "hls4ml"],
    ("float", 32): [],
}


def runtimes(sentences: list[str]) -> list[str]:
    return [one.split(": ", 1)[0] for one in sentences]


@pytest.mark.parametrize(("name", "bits"), EXPECTED)
def test_runtimes_that_a_file_is_not_for(name: str, bits: int) -> None:
    assert runtimes(not_for(parsed(bits, name), net(bits).spec)) == EXPECTED[name, bits]


def test_a_file_for_hls4ml() -> None:
    made = net(4)
    model = build("qonnx", made.folded, made.spec, consumer=HLS4ML)
    assert runtimes(not_for(model, made.spec)) == ["onnxruntime", "FINN"]


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def test_results_are_added_to_the_metadata_and_nothing_else_changes(tmp_path: Path) -> None:
    path = written(tmp_path, 4, "packed")
    add_results(path, accuracy={"images": 200}, equal_in=[], not_for=[], failed=["optimised"])
    results = {"accuracy": {"images": 9}, "equal_in": ["onnxruntime 1"], "not_for": ["OpenVINO: no"], "failed": []}
    add_results(path, **results)  # type: ignore[arg-type]
    model = onnx.load(path)
    found = metadata(model)
    assert {key: json.loads(found.pop(f"robustq.{key}")) for key in results} == results
    assert found == metadata(parsed(4, "packed"))
    assert model.graph.SerializeToString() == parsed(4, "packed").graph.SerializeToString()
