"""Export folders through the file alone: without their model.pt, and as a second count beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import robustq
from robustq.errors import RobustqError
from robustq.export.bundle import MODEL
from robustq.twin.network import FAMILIES
from robustq.twin.registry import OPERATORS

FEW: dict[str, Any] = {"images": 20, "epsilon": 16 / 255, "device": "cpu"}


def exported(model: Path, folder: Path, format_name: str) -> Path:
    robustq.export_model(
        model, format_name=format_name, images=20, recheck=False, max_drift=1.0, device="cpu", out=folder
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["integer", "qonnx"])
def test_a_folder_is_checked_without_its_model(digits_w4a4: Path, tmp_path: Path, format_name: str) -> None:
    folder = exported(digits_w4a4, tmp_path / "out", format_name)
    whole = robustq.recheck_bundle(folder, **FEW)
    (second,) = whole["checks"]
    assert second["name"] == "file alone" and not second["raised"] and not second["evidence"]["weaker"]
    assert second["evidence"]["through_model"] == whole["robust_accuracy"]
    assert whole["not_compared"] == [] and whole["compared_with"] == "the folded network"

    (folder / MODEL).unlink()
    alone = robustq.recheck_bundle(folder, **FEW)
    assert alone["not_compared"][0] == "answers of the network in PyTorch: model.pt is not in the folder"
    assert alone["compared_with"] == "the twin of the file" and alone["shortfalls"] == []
    assert alone["label"] == whole["label"] and alone["not_for"] == whole["not_for"]
    assert alone["clean_accuracy"] == whole["clean_accuracy"]
    if format_name == "integer":  # QONNX with its model is judged in another file
        assert alone["judge"] == "onnxruntime" and alone["integer_layers"] == whole["integer_layers"]
        assert alone["robust_accuracy"] == second["evidence"]["through_file"]
    else:
        assert alone["judge"] == "pytorch" and len(alone["not_compared"]) == 2
    assert abs(alone["robust_accuracy"] - whole["robust_accuracy"]) <= 1 / 20


@pytest.mark.slow
def test_a_folder_without_its_model_is_attacked_like_its_file(digits_w4a4: Path, tmp_path: Path) -> None:
    folder = exported(digits_w4a4, tmp_path / "out", "integer")
    (folder / MODEL).unlink()
    (file,) = folder.glob("*.onnx")
    many: dict[str, Any] = {**FEW, "images": 100, "suite": "recheck"}
    attacked, alone = robustq.attack_model(folder, **many), robustq.attack_model(file, **many)
    assert 0.0 < attacked["robust_accuracy"] == alone["robust_accuracy"] < alone["clean_accuracy"]
    assert attacked["model"] == str(folder) and attacked["judge"] == "onnxruntime"


def test_a_twin_that_lacks_an_operator_is_a_note(
    digits_w4a4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(digits_w4a4, tmp_path / "out", "integer")
    assert FAMILIES  # loaded, so that the table is full
    monkeypatch.delitem(OPERATORS, "GlobalAveragePool")
    found = robustq.attack_model(folder, suite="recheck", **{**FEW, "images": 10})
    assert "not attacked through the file alone" in found["notes"][0] and "GlobalAveragePool" in found["notes"][0]
    assert found["checks"] == []
    shutil.copytree(folder, tmp_path / "alone")
    (tmp_path / "alone" / MODEL).unlink()
    with pytest.raises(RobustqError, match=r"has no model\.pt, and its file gives no gradients"):
        robustq.recheck_bundle(tmp_path / "alone", **FEW)
