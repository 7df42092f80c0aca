"""What a file says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from robustq.export.metadata import add_results
from tests.export.exported import parsed, written


def said(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def test_results_are_added_and_nothing_else_changes(tmp_path: Path) -> None:
    path = written(tmp_path, 4, "packed")
    add_results(path, accuracy={"images": 200, "clean_accuracy": 0.5}, equal_in=[], not_for=[], failed=["optimised"])
    add_results(
        path,
        accuracy={"images": 200, "clean_accuracy": 0.75},
        equal_in=["onnxruntime 1"],
        not_for=["OpenVINO: no"],
        failed=[],
    )
    model = onnx.load(path)
    about = said(model)
    assert json.loads(about.pop("robustq.accuracy")) == {"images": 200, "clean_accuracy": 0.75}
    assert json.loads(about.pop("robustq.equal_in")) == ["onnxruntime 1"]
    assert json.loads(about.pop("robustq.not_for")) == ["OpenVINO: no"]
    assert json.loads(about.pop("robustq.failed")) == []
    assert about == said(parsed(4, "packed"))
    assert model.graph.SerializeToString() == parsed(4, "packed").graph.SerializeToString()
