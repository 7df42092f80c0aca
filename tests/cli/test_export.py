"""From float to a judged file: train, harden, export, recheck and attack of the deployed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import robustq
from robustq.checkpoint import load_model, save_model
from robustq.export.bundle import RECORD, write_record
from robustq.export.formats import build
from robustq.seals import sha256
from tests.cli.conftest import FAST_TRAIN, Run


def export(run: Run, model: Path, *words: str) -> dict[str, Any]:
    outcome = run("export", model, "--images", "40", "--out", "bundle", "--json", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.json["shortfalls"] == []
    return outcome.json


def metadata(found: dict[str, Any]) -> dict[str, str]:
    return {entry.key.removeprefix("robustq."): entry.value for entry in onnx.load(found["files"][0]).metadata_props}


def test_the_job_runs_from_float_to_a_judged_file(run: Run) -> None:
    trained = run("train", "--recipe", "digits/resnet8-float-natural", *FAST_TRAIN, "--json")
    assert trained.code == 0, trained.err
    assert {"checkpoint", "clean_accuracy", "epochs", "seconds_per_epoch"} <= trained.json.keys()
    assert not {"bits", "method", "seconds"} & trained.json.keys()
    source = Path(trained.json["checkpoint"])

    natural = run("harden", source, "--bits", "4", "--recipe", "natural", *FAST_TRAIN)
    assert natural.code == 0, natural.err
    refused = run("export")  # which never takes an undefended model by itself
    assert refused.code == 2 and "no model given" in refused.err

    hardened = run("harden", source, "--bits", "4", *FAST_TRAIN, "--json").json
    assert (hardened["bits"], hardened["method"], hardened["epochs"]) == (4, "odgq", 1)
    folder = Path(hardened["run"])
    assert folder.name == "resnet8-w4a4-odgq"
    names = {"config.json", "metrics.jsonl", "best.pt", "last.pt", "result.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert json.loads((folder / "result.json").read_text()) == hardened
    config = json.loads((folder / "config.json").read_text())
    float_accuracy = config["source"].pop("float_accuracy")
    assert config["source"] == {"path": str(source), "sha256": sha256(source)}
    assert float_accuracy == hardened["float_holdout_accuracy"] > 0
    assert (config["recipe"]["train_images"], config["spec"]["weight_bits"]) == (100, 4)
    settings = config["recipe"]["settings"]
    assert (settings["domains"], settings["features"], settings["batch_norm"]) == (4, "pooled", "eval")

    # The last hardened model, without naming it. After one epoch its answers are close calls.
    exported = run("export", "--images", "60", "--max-drift", "0.2", "--json")
    assert exported.code == 0, exported.err
    assert {"files", "parity", "integer_layers", "float_layers", "recheck"} <= exported.json.keys()
    bundle = Path(exported.json["bundle"])
    assert bundle.name == "resnet8-w4a4-odgq-integer" and exported.json["float_layers"] == []
    assert {file.name for file in bundle.iterdir()} == {
        "resnet8-w4a4.onnx",
        "model.pt",
        RECORD,
        "kit",
        "card.md",
        "card.html",
        "card.cdx.json",
    }
    facts = json.loads((bundle / "kit" / "kit.json").read_text())
    counts = (round(exported.json["recheck"][key] * 60) for key in ("clean_accuracy", "robust_accuracy"))
    assert (facts["clean_right"], facts["robust_right"]) == tuple(counts)
    assert sha256(bundle / "model.pt") == json.loads((bundle / RECORD).read_text())["sha256"]["model.pt"]

    rechecked = run("recheck", bundle, "--images", "60", "--json")
    assert rechecked.code == 0, rechecked.err
    assert {"parity", "flags", "verdict"} <= rechecked.json.keys() and rechecked.json["verdict"] == "not judged"
    for key in ("clean_accuracy", "robust_accuracy", "attacks", "interval"):
        assert rechecked.json[key] == exported.json["recheck"][key], key

    again = run("export", "--images", "20", "--no-recheck", "--json").json
    assert Path(again["bundle"]).name == "resnet8-w4a4-odgq-integer-2" and again["recheck"] is None


def test_a_packed_file_of_pixels(run: Run, digits_w4a4: Path) -> None:
    found = export(run, digits_w4a4, "--format", "packed", "--input", "uint8")
    about = metadata(found)
    assert about["input"].startswith("uint8") and about["format"] == "packed"
    counted = json.loads(about["accuracy"])
    assert counted["images"] == 40 and counted["verdict"] == "not judged"
    assert counted["clean_accuracy"] == found["recheck"]["clean_accuracy"]
    assert counted["robust_accuracy"] == found["recheck"]["robust_accuracy"]
    assert found["size_bytes"] == Path(found["files"][0]).stat().st_size


@pytest.mark.slow
def test_qonnx_with_batch_norm_is_compared_with_the_unfolded_network(run: Run, digits_w4a4: Path) -> None:
    found = export(run, digits_w4a4, "--format", "qonnx", "--batch-norm", "keep", "--no-recheck")
    operations = [node.op_type for node in onnx.load(found["files"][0]).graph.node]
    assert operations.count("BatchNormalization") == 9
    assert found["judged_file"] == "qcdq"  # onnxruntime cannot load QONNX
    again = run("recheck", "bundle", "--images", "20", "--json")
    assert again.code == 0, again.err
    assert 0.0 <= again.json["robust_accuracy"] <= again.json["clean_accuracy"] <= 1.0
    # The folded network differs from the unfolded one by its rounded biases; this one does not differ.
    assert again.json["parity"]["qonnx_executor"]["max_difference"] < 1e-5


def test_a_float_network_is_written_as_float(run: Run, digits_float: Path) -> None:
    found = export(run, digits_float, "--format", "float", "--input", "uint8", "--no-recheck")
    assert found["integer_layers"] == [] and found["parity"]["optimised"]["different_top1"] == 0


@pytest.mark.slow
def test_recheck_fails_a_file_that_is_not_the_model_beside_it(run: Run, digits_w4a4: Path) -> None:
    export(run, digits_w4a4, "--no-recheck")
    model, spec, info = load_model(Path("bundle/model.pt"))
    with torch.no_grad():
        model.get_parameter("fc.weight").neg_()
    save_model(Path("bundle/model.pt"), model, spec, info=info)
    record = json.loads(Path("bundle", RECORD).read_text())
    write_record(Path("bundle"), record, *Path("bundle").glob("*.onnx"), Path("bundle/model.pt"))
    result = run("recheck", "bundle", "--images", "10", "--json")
    assert result.code == 1 and result.json["shortfalls"]
    assert "another class" in result.err


@pytest.mark.slow
def test_a_file_that_failed_parity_has_another_name_and_says_so_first(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **options: Any) -> onnx.ModelProto:
        model = build(*arguments, **options)
        scale = next(node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear")
        for tensor in model.graph.initializer:
            if tensor.name == scale:
                tensor.CopyFrom(numpy_helper.from_array(4 * numpy_helper.to_array(tensor), scale))
        return model

    monkeypatch.setattr("robustq.workflow.export.build", wrong)
    exported = run("export", digits_w4a4, "--no-recheck", "--images", "20", "--out", "bundle", "--json")
    assert exported.code == 1
    (file,) = Path("bundle").glob("*.onnx")
    assert file.name == "resnet8-w4a4.failed.onnx"
    first = f"FAILED  {file.name}: optimised: "
    assert exported.json["equal_in"] == [] and "another class" in exported.json["shortfalls"][0]
    assert run("info", "bundle").out.startswith(first)
    assert run("info", file).out.startswith("FAILED  optimised: ")
    rechecked = run("recheck", "bundle", "--images", "5")
    attacked = run("attack", "bundle", "--suite", "recheck", "--images", "5", "--require", "0")
    for told in (rechecked, attacked):
        assert told.code == 1 and told.out.startswith(first) and told.err.startswith(first)
    assert "the file failed a check of its export" in attacked.err


def test_a_quickstart_with_a_failed_check_exits_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"model": "m", "clean": 1.0, "fgsm": 1.0, "pgd20": 1.0, "margin_pgd40": 1.0, "size_bytes": 1}
    result = {
        "rows": [{**row, "worst_case": 1.0, "worst_case_interval": [0.9, 1.0]}],
        "test_images": 1,
        "epsilon": 0.1,
        "seconds": 1.0,
        "folder": "f",
        "shortfalls": ["optimised: 40 of 359 images get another class"],
    }
    monkeypatch.setattr("robustq.workflow.quickstart.quickstart", lambda **_: result)
    outcome = run("quickstart")
    assert outcome.code == 1 and "FAILED  optimised" in outcome.out


@pytest.mark.slow
def test_results_of_the_python_functions_are_typed_and_read_like_the_json(
    digits_w4a4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = robustq.export_model(str(digits_w4a4), images=20, recheck=False, out=Path("bundle"))
    found = robustq.attack_model(bundle["bundle"], suite="recheck", images=20, epsilons=(0.0,))
    assert found["judge"] == found.judge == "onnxruntime"
    assert found["robust_accuracy"] == found.evaluation.robust_accuracy == found["curve"][-1]["robust_accuracy"]
    assert robustq.recheck_bundle(bundle.bundle, images=20)["robust_accuracy"] == found["robust_accuracy"]
    for result in (bundle, found):
        assert dict(result) == result.to_dict() == json.loads(json.dumps(result.to_dict()))
        with pytest.raises(AttributeError):
            result.seed = 1  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(("changed", "code"), [(4, 0), (5, 1)])
def test_folding_that_changes_more_than_two_percent_of_the_answers_fails(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch, changed: int, code: int
) -> None:
    from robustq.export.parity import Agreement

    monkeypatch.setattr("robustq.workflow.export.drift", lambda *_: Agreement(100, changed, 0.1, 0.1))
    told = run("export", digits_w4a4, "--images", "5", "--no-recheck", "--device", "cpu")
    assert told.code == code
    assert ("folding BatchNorm changed the class of 5 of 100 images" in told.err.splitlines()[-1]) == (code == 1)
