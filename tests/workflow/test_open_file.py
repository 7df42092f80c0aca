"""A lone .onnx under attack: the same count as through its network, and files that are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import robustq
from robustq.data import load_dataset, to_float
from robustq.errors import RobustqError
from tests.twin.files import Net, quantized, trained, write

COMMON: dict[str, Any] = {
    "suite": "recheck",
    "images": 200,
    "epsilon": 16 / 255,
    "device": "cpu",
    "train_surrogates": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["integer", "qonnx"])
def test_a_lone_file_is_as_robust_as_with_its_network(digits_w4a4: Path, tmp_path: Path, format_name: str) -> None:
    out = tmp_path / "export"
    robustq.export_model(digits_w4a4, format_name=format_name, images=20, recheck=False, device="cpu", out=out)
    (file,) = out.glob("*.onnx")
    alone = robustq.attack_model(file.rename(tmp_path / "alone.onnx"), **COMMON)
    network = robustq.attack_model(digits_w4a4, **COMMON)
    assert alone["judge"] == ("onnxruntime" if format_name == "integer" else "pytorch")
    assert alone["label"] == "resnet8-w4a4"
    assert alone["twin_agreement"] >= 0.999
    assert alone["clean_accuracy"] == pytest.approx(network["clean_accuracy"], abs=0.01)
    assert alone["robust_accuracy"] < 0.9 * alone["clean_accuracy"]
    # Two of 200 images: the folded file has other codes on ties.
    assert alone["robust_accuracy"] == pytest.approx(network["robust_accuracy"], abs=0.01)


def test_a_file_of_another_tool_is_attacked_as_well_as_its_float_source(tmp_path: Path) -> None:
    x, y = load_dataset("digits").train.take(0)
    x = to_float(x)
    source = write(trained(x, y), tmp_path / "source.onnx")
    path = quantized(source, tmp_path / "theirs.onnx", x[:64], ("QOperator", True, "QUInt8", "QInt8"))
    with pytest.raises(RobustqError, match="does not say how it takes pixels; add --input unit"):
        robustq.attack_model(path, data="digits", **COMMON)
    with pytest.raises(RobustqError, match="does not name its data; add --data"):
        robustq.attack_model(path, pixels="unit", **COMMON)
    float_file = robustq.attack_model(source, data="digits", pixels="unit", **COMMON)
    found = robustq.attack_model(path, data="digits", pixels="unit", **COMMON)
    assert found["label"] == "theirs"
    assert found["clean_accuracy"] > 0.8
    assert found["robust_accuracy"] <= float_file["robust_accuracy"] + 0.01


def test_a_file_that_answers_by_chance_is_not_attacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write(Net().eval(), tmp_path / "untrained.onnx")
    with pytest.raises(
        RobustqError, match=r"of 200 answers are right, no more than by chance; check --input"
    ) as raised:
        robustq.attack_model(path, data="digits", pixels="unit", **COMMON)
    assert "\n" not in str(raised.value)


def test_options_of_a_lone_file_are_for_it_alone(digits_w4a4: Path) -> None:
    with pytest.raises(RobustqError, match="--input and --layout are for a lone"):
        robustq.attack_model(digits_w4a4, pixels="unit", **COMMON)
