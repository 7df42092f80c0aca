"""card.cdx.json against the published schema, and against what it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from robustq.report.cyclonedx import write_cyclonedx
from robustq.seals import sha256
from tests.report.test_card import COUNTED, RECORD

REPLAYED = {
    "runtime": "openvino",
    "version": "2026.4.1",
    "images": 1000,
    "clean_right": 640,
    "robust_right": 350,
    "different": 23,
    "refused": None,
    "clean_accuracy": 0.64,
    "robust_accuracy": 0.35,
    "clean_interval": [0.61, 0.669],
    "robust_interval": [0.321, 0.38],
}
MADE = {**RECORD, "weight_bits": 4, "act_bits": 4, "judge": "onnxruntime"}


def written(folder: Path, **entries: Any) -> dict[str, Any]:
    for name in ("net.onnx", "model.pt"):
        (folder / name).write_bytes(name.encode())
    path = write_cyclonedx(folder, {**MADE, **entries}, folder / "net.onnx", folder / "model.pt")
    text = path.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("entries", [{}, {"recheck": None}, {"shortfalls": ["wrong"], "not_for": ["hls4ml"]}])
def test_the_document_is_valid(tmp_path: Path, entries: dict[str, Any]) -> None:
    written(tmp_path, **entries)


def test_the_schema_is_strict(tmp_path: Path) -> None:
    found = written(tmp_path)
    found["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] = 0.65
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(found)) is not None


def test_metrics_and_hashes(tmp_path: Path) -> None:
    target = {"name": "openvino", "text": "re-checked", "replayed": [REPLAYED, {**REPLAYED, "refused": "no"}]}
    found = written(tmp_path, target=target)
    component = found["metadata"]["component"]
    assert component["hashes"] == [{"alg": "SHA-256", "content": sha256(tmp_path / "net.onnx")}]
    assert found["components"][0]["hashes"][0]["content"] == sha256(tmp_path / "model.pt")
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(one["type"], float(one["value"])) for one in metrics] == [
        ("accuracy", COUNTED["clean_accuracy"]),
        ("robust accuracy", COUNTED["robust_accuracy"]),
        ("accuracy", 0.64),
        ("robust accuracy", 0.35),
    ]
    assert metrics[1]["confidenceInterval"] == {"lowerBound": "0.261", "upperBound": "0.317"}
    assert "within 8/255 (suite recheck, upper bound), onnxruntime" in metrics[1]["slice"]
    assert metrics[3]["slice"].endswith("the images found for onnxruntime in openvino 2026.4.1")
    assert written(tmp_path)["serialNumber"] == found["serialNumber"]  # that of the file's hash
