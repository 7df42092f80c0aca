"""A lone .onnx under attack: the same count as through its network, and files that are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import robustq
from robustq.data import load_dataset, to_float
from robustq.errors import RobustqError
from robustq.twin.network import FAMILIES
from robustq.twin.registry import OPERATORS
from tests.evaluation.budgets import small
from tests.twin.files import Net, changed, quantized, trained, write

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
    assert alone["clean_accuracy"] == pytest.approx(network["clean_accuracy"], abs=2.5 / 200)
    assert alone["robust_accuracy"] < 0.9 * alone["clean_accuracy"]
    # Two of 200 images: the folded file has other codes on ties.
    assert alone["robust_accuracy"] == pytest.approx(network["robust_accuracy"], abs=2.5 / 200)


def test_a_file_of_another_tool_is_attacked_as_well_as_its_float_source(tmp_path: Path) -> None:
    x, y = load_dataset("digits").train.take(0)
    x = to_float(x)
    source = write(trained(x, y), tmp_path / "source.onnx")
    path = quantized(source, tmp_path / "theirs.onnx", x[:64], ("QOperator", True, "QUInt8", "QInt8"))
    with pytest.raises(RobustqError, match="does not say how it takes pixels; add --input unit"):
        robustq.attack_model(source, data="digits", **COMMON)
    with pytest.raises(RobustqError, match="does not name its data; add --data"):
        robustq.attack_model(path, pixels="unit", **COMMON)
    float_file = robustq.attack_model(source, data="digits", pixels="unit", **COMMON)
    found = robustq.attack_model(path, data="digits", **COMMON)  # its first quantizer covers [0, 1]
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float file of digits."""
    x, y = load_dataset("digits").train.take(0)
    return write(trained(to_float(x), y), tmp_path_factory.mktemp("files") / "source.onnx")


def answer_classes(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["best"], axis=-1))
    model.graph.node.append(helper.make_node("Squeeze", ["best"], ["class"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("class", TensorProto.INT64, ["N"]))


def test_a_file_that_answers_with_classes_has_the_gradients_of_its_logits(source: Path, tmp_path: Path) -> None:
    path = changed(source, tmp_path / "classes.onnx", answer_classes)
    options: dict[str, Any] = {**COMMON, "data": "digits", "pixels": "unit", "images": 100}
    found, logits = (robustq.attack_model(one, **options) for one in (path, source))
    for key in ("clean_accuracy", "robust_accuracy", "attacks", "twin_agreement"):
        assert found[key] == logits[key], key
    assert found["judge"] == "onnxruntime" and 0.0 < found["robust_accuracy"] < found["clean_accuracy"]


def test_without_gradients_the_suite_goes_on(source: Path, digits_float: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustq.evaluation.run_suite.SUITES", {n: small(n) for n in ("standard", "recheck")})
    assert FAMILIES  # loaded, so that the table is full
    monkeypatch.delitem(OPERATORS, "Relu")
    options: dict[str, Any] = {**COMMON, "data": "digits", "pixels": "unit", "images": 20, "epsilon": 48 / 255}
    with pytest.raises(RobustqError, match=r"suite 'recheck' needs gradients \(Relu .*\); take --suite"):
        robustq.attack_model(source, **options)
    found = robustq.attack_model(source, **{**options, "suite": "standard"}, surrogates=[digits_float])
    assert found["notes"][0].endswith("Relu '/first/first.1/Relu' is an operator that is not supported")
    attacks = [stage["attack"].split(":")[0] for stage in found["stages"]]
    assert attacks == ["uniform noise", "corners", "transfer", "square", "rays"]
    assert {stage["attack"] for stage in found["stages"] if stage["gradient_steps"]} <= {f"transfer: {digits_float}"}
    assert found["robust_accuracy"] < found["clean_accuracy"]
    assert found["verdict"] == "not judged" and found["not_judged_for"][0].startswith("no gradient was used")
    assert found["twin_agreement"] is None and found["flags"] == []


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            foreign_operator,
            r"com.example.Relu '.*' is an operator that is not supported; without gradients: has the op",
        ),
        (second_output, r"has 2 outputs \(logits, .*\); a classifier has one: cut the file to its logits"),
    ],
)
def test_a_file_that_nothing_can_attack_is_one_line(source: Path, tmp_path: Path, change: Any, line: str) -> None:
    path = changed(source, tmp_path / "other.onnx", change)
    with pytest.raises(RobustqError, match=line) as raised:
        robustq.attack_model(path, data="digits", pixels="unit", **COMMON)
    assert "\n" not in str(raised.value)


def test_compiling_is_for_networks(source: Path) -> None:
    with pytest.raises(RobustqError, match=r"--compile is for the network of a model\.pt; leave it out"):
        robustq.attack_model(source, data="digits", pixels="unit", compiled=True, **COMMON)
