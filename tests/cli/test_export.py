"""robustq export: its options, and what the written file says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.cli.conftest import Run


def export(run: Run, model: Path, *words: str) -> dict[str, Any]:
    outcome = run("export", str(model), "--images", "40", "--out", "bundle", "--json", *words)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    assert found["shortfalls"] == []
    return found


def said(found: dict[str, Any]) -> dict[str, str]:
    return {entry.key.removeprefix("robustq."): entry.value for entry in onnx.load(found["files"][0]).metadata_props}


def test_a_packed_file_of_pixels(run: Run, digits_w4a4: Path) -> None:
    found = export(run, digits_w4a4, "--format", "packed", "--input", "uint8")
    about = said(found)
    assert about["input"].startswith("uint8") and about["format"] == "packed"
    counted = json.loads(about["accuracy"])
    assert counted["clean_accuracy"] == found["recheck"]["clean_accuracy"] and counted["images"] == 40
    assert counted["robust_accuracy"] == found["recheck"]["robust_accuracy"] and counted["verdict"] == "not judged"
    assert found["size_bytes"] == Path(found["files"][0]).stat().st_size
    again = run("recheck", "bundle", "--images", "40", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["robust_accuracy"] == found["recheck"]["robust_accuracy"]


def test_without_a_recheck_clean_accuracy_is_counted(run: Run, digits_w4a4: Path) -> None:
    found = export(run, digits_w4a4, "--no-recheck")
    assert found["recheck"] is None
    assert json.loads(said(found)["accuracy"]).keys() == {"images", "clean_accuracy", "clean_interval"}


def test_qonnx_with_batch_norm_is_compared_with_the_unfolded_network(run: Run, digits_w4a4: Path) -> None:
    found = export(run, digits_w4a4, "--format", "qonnx", "--batch-norm", "keep", "--no-recheck")
    operations = [node.op_type for node in onnx.load(found["files"][0]).graph.node]
    assert operations.count("BatchNormalization") == 9
    again = run("recheck", "bundle", "--images", "40", "--json")
    assert again.code == 0, again.err
    # The folded network differs from the unfolded one by its rounded biases; this one does not differ.
    assert json.loads(again.out)["parity"]["qonnx_executor"]["max_difference"] < 1e-5


@pytest.mark.parametrize("pixels", ["float", "uint8"])
def test_a_float_network_is_written_as_float(run: Run, digits_float: Path, pixels: str) -> None:
    found = export(run, digits_float, "--format", "float", "--input", pixels, "--no-recheck")
    assert found["integer_layers"] == [] and found["parity"]["optimised"]["different_top1"] == 0
