"""The command line in one process: the thin job end to end, --json, exit codes, and one line for every bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import robustq
from robustq import cli
from robustq.checkpoint import load_model, save_model
from robustq.export.bundle import RECORD
from robustq.export.formats import build
from robustq.files import sha256


class Outcome:
    """Exit code, stdout and stderr of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in an empty folder."""
    workplace = tmp_path / "here"
    workplace.mkdir()
    monkeypatch.chdir(workplace)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["robustq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


FAST_TRAIN = ("--set", "epochs=1", "--set", "train_images=200", "--device", "cpu")


def test_the_thin_job_runs_from_float_to_a_judged_file(run: Run) -> None:
    trained = run("train", "--recipe", "digits/resnet8-float-natural", *FAST_TRAIN, "--json")
    assert trained.code == 0, trained.err
    assert {"checkpoint", "clean_accuracy", "epochs", "seconds_per_epoch"} <= trained.json.keys()
    assert trained.json["epochs"] == 1

    hardened = run("harden", trained.json["checkpoint"], "--bits", "4", *FAST_TRAIN, "--json")
    assert hardened.code == 0, hardened.err
    assert hardened.json["bits"] == 4
    assert hardened.json["method"] == "odgq"
    folder = Path(hardened.json["run"])
    assert folder.name == "resnet8-w4a4-odgq"
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "best.pt",
        "last.pt",
        "result.json",
    }
    assert json.loads((folder / "result.json").read_text())["clean_accuracy"] == hardened.json["clean_accuracy"]
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["train_images"] == 200
    assert config["spec"]["weight_bits"] == 4

    exported = run("export", "--images", "60", "--json")  # the last hardened model, without naming it
    assert exported.code == 0, exported.err
    assert {"files", "parity", "integer_layers", "float_layers", "recheck"} <= exported.json.keys()
    bundle = Path(exported.json["bundle"])
    assert bundle.name == "resnet8-w4a4-odgq-integer"
    assert {file.suffix for file in bundle.iterdir()} == {".onnx", ".pt", ".json"}
    assert exported.json["float_layers"] == []
    assert sha256(bundle / "model.pt") == json.loads((bundle / RECORD).read_text())["sha256"]["model.pt"]

    rechecked = run("recheck", bundle, "--images", "60", "--json")
    assert rechecked.code == 0, rechecked.err
    assert {"parity", "clean_accuracy", "robust_accuracy", "flags", "verdict"} <= rechecked.json.keys()
    assert rechecked.json["verdict"] == "not judged"
    for key in ("clean_accuracy", "robust_accuracy", "attacks", "interval"):
        assert rechecked.json[key] == exported.json["recheck"][key], key

    again = run("export", "--images", "20", "--no-recheck", "--json")
    assert Path(again.json["bundle"]).name == "resnet8-w4a4-odgq-integer-2"
    assert again.json["recheck"] is None


@pytest.mark.parametrize("format_name", ["qonnx", "qcdq"])
def test_other_formats_are_rechecked_as_well(run: Run, digits_w4a4: Path, format_name: str) -> None:
    exported = run("export", digits_w4a4, "--format", format_name, "--images", "40", "--json")
    assert exported.code == 0, exported.err
    assert exported.json["judged_file"] == "qcdq"
    assert ("qonnx_executor" in exported.json["parity"]) == (format_name == "qonnx")
    assert 0.0 <= exported.json["recheck"]["robust_accuracy"] <= exported.json["recheck"]["clean_accuracy"] <= 1.0


def test_attack_counts_a_model_and_its_deployed_file_alike(run: Run, digits_w4a4: Path) -> None:
    paper = ("--suite", "paper", "--no-surrogates", "--images", "50", "--json")
    model = run("attack", digits_w4a4, *paper)
    assert model.code == 0, model.err
    assert set(model.json["attacks"]) == {"gn", "fgsm", "pgd20", "bim20", "tpgd20"}
    assert model.json["images"] == 50
    assert model.json["robust_accuracy"] <= min(model.json["attacks"].values())
    low, high = model.json["interval"]
    assert low <= model.json["robust_accuracy"] <= high
    run("export", digits_w4a4, "--no-recheck", "--images", "20", "--out", "bundle")
    deployed = run("attack", "bundle", *paper)
    assert deployed.json["judge"] == "onnxruntime"
    # Bias rounding may turn an image or two of fifty.
    assert deployed.json["robust_accuracy"] == pytest.approx(model.json["robust_accuracy"], abs=0.1)


def test_require_turns_a_low_robust_accuracy_into_exit_1(run: Run, digits_w4a4: Path) -> None:
    clean = run("attack", digits_w4a4, "--images", "20", "--epsilon", "0", "--json").json["robust_accuracy"]
    assert clean > 0
    met = run("attack", digits_w4a4, "--images", "20", "--epsilon", "0", "--require", str(clean))
    assert met.code == 0, met.err
    barely = run("attack", digits_w4a4, "--images", "20", "--epsilon", "0", "--require", str(clean + 0.01))
    assert barely.code == 1
    strong = ("--suite", "recheck", "--images", "20", "--epsilon", "1")
    missed = run("attack", digits_w4a4, *strong, "--require", "0.9", "--json")
    assert missed.code == 1
    assert missed.json["robust_accuracy"] < 0.9
    assert missed.err.strip().splitlines()[-1].startswith("robustq: robust accuracy")


def test_recheck_fails_a_file_that_is_not_the_model_beside_it(run: Run, digits_w4a4: Path) -> None:
    run("export", digits_w4a4, "--no-recheck", "--images", "20", "--out", "bundle")
    model, spec, info = load_model(Path("bundle/model.pt"))
    with torch.no_grad():
        model.get_parameter("fc.weight").neg_()
    save_model(Path("bundle/model.pt"), model, spec, info=info)
    record = json.loads(Path("bundle", RECORD).read_text())
    record["sha256"]["model.pt"] = sha256(Path("bundle/model.pt"))
    Path("bundle", RECORD).write_text(json.dumps(record))
    result = run("recheck", "bundle", "--images", "40", "--json")
    assert result.code == 1
    assert result.json["shortfalls"]
    assert "another class" in result.err


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
    exported = run("export", digits_w4a4, "--no-recheck", "--images", "40", "--out", "bundle", "--json")
    assert exported.code == 1
    (file,) = Path("bundle").glob("*.onnx")
    assert file.name == "resnet8-w4a4.failed.onnx"
    first = f"FAILED  {file.name}: optimised: "
    assert exported.json["equal_in"] == [] and "another class" in exported.json["shortfalls"][0]
    for command in ("attack bundle --suite recheck", "recheck bundle", "info bundle"):
        told = run(*command.split(), *(() if "info" in command else ("--images", "20")))
        assert told.out.startswith(first), command
        assert told.code == (1 if "recheck bundle" in command else 0)
        assert told.err.startswith(first) or "info" in command
    assert run("info", str(file)).out.startswith("FAILED  optimised: ")
    required = run("attack", "bundle", "--suite", "recheck", "--images", "20", "--require", "0")
    assert required.code == 1 and "the file did not pass its export" in required.err


def test_export_says_where_the_answers_were_proved(run: Run, digits_w4a4: Path) -> None:
    exported = run("export", digits_w4a4, "--no-recheck", "--images", "40", "--out", "bundle")
    proved = f"onnxruntime {version('onnxruntime')} (optimised, unoptimised, exact; 40 images)"
    assert f"equal   answers proved in {proved}" in exported.out.splitlines()[-3:]
    (file,) = Path("bundle").glob("*.onnx")
    about = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(about["robustq.equal_in"]) == [proved]
    assert json.loads(about["robustq.failed"]) == []
    limits = json.loads(about["robustq.not_for"])
    assert any("INFERENCE_PRECISION_HINT=f32" in one for one in limits)
    assert exported.out.splitlines()[-1 - len(limits) : -1] == [f"not for {one}" for one in limits]
    assert json.loads(Path("bundle/bundle.json").read_text())["not_for"] == limits


def test_results_can_be_kept_in_a_file(run: Run, digits_w4a4: Path) -> None:
    told = run("attack", digits_w4a4, "--images", "10", "--epsilon", "0", "--json", "--out", "found.json")
    assert json.loads(Path("found.json").read_text()) == told.json
    again = run("attack", digits_w4a4, "--images", "10", "--epsilon", "0", "--out", "found.json")
    assert again.code == 2
    assert "exists already" in again.err


def test_same_seed_same_model_and_same_count(run: Run, digits_float: Path) -> None:
    fast = ("--bits", "2", "--set", "epochs=1", "--set", "train_images=150", "--device", "cpu")
    states = []
    for out, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert run("harden", digits_float, *fast, "--seed", seed, "--out", out).code == 0
        states.append(load_model(Path(out, "last.pt"))[0].state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_recipes_lists_and_prints(run: Run, tmp_path: Path) -> None:
    listed = run("recipes")
    assert "cifar10/resnet20-w4a4-odgq" in listed.out
    printed = run("recipes", "cifar10/resnet20-w4a4-odgq")
    # What is printed is a recipe itself.
    own = tmp_path / "own.toml"
    own.write_text(printed.out)
    same = run("recipes", own, "--json").json["recipes"][0]
    original = run("recipes", "cifar10/resnet20-w4a4-odgq", "--json").json["recipes"][0]
    # Not its rows of the paper's tables, though, which a changed copy would claim as well.
    assert same["paper_rows"] == {} and original["paper_rows"] == {"I": 10, "IV": 1, "V": 6}
    its_own = {"name": "", "summary": "", "paper_rows": {}}
    assert {**same, **its_own} == {**original, **its_own}


def test_a_bare_state_dict_is_hardened_when_the_data_is_named(run: Run, digits_float: Path) -> None:
    torch.save(load_model(digits_float)[0].state_dict(), "weights.pt")
    refused = run("harden", "weights.pt", "--bits", "4")
    assert refused.code == 2
    assert "add --data" in refused.err
    taken = run("harden", "weights.pt", "--bits", "8", "--data", "digits", *FAST_TRAIN, "--json")
    assert taken.code == 0, taken.err
    assert load_model(Path(taken.json["checkpoint"]))[1].data == "digits"


def test_an_undefended_twin_is_not_what_export_ships(run: Run, digits_float: Path) -> None:
    natural = run("harden", digits_float, "--bits", "4", "--recipe", "natural", *FAST_TRAIN)
    assert natural.code == 0, natural.err
    refused = run("export")
    assert refused.code == 2
    assert "no model given" in refused.err


def test_a_run_says_what_it_was_made_from(run: Run, digits_float: Path) -> None:
    run("harden", digits_float, "--bits", "4", *FAST_TRAIN, "--out", "run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["source"] == {"path": str(digits_float), "sha256": sha256(digits_float)}
    settings = config["recipe"]["settings"]
    assert (settings["domains"], settings["features"], settings["batch_norm"]) == (4, "pooled", "eval")


def test_a_quickstart_that_falls_short_exits_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert outcome.code == 1
    assert "FAILED  optimised" in outcome.out


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    told = run()
    assert told.code == 0
    assert "harden" in told.out


def test_the_python_words_take_plain_strings(digits_w4a4: Path, tmp_path: Path) -> None:
    bundle = robustq.export_model(str(digits_w4a4), images=20, recheck=False, out=tmp_path / "bundle")
    found = robustq.attack_model(bundle["bundle"], suite="recheck", images=20)
    assert found["judge"] == "onnxruntime"
    assert robustq.recheck_bundle(bundle["bundle"], images=20)["robust_accuracy"] == found["robust_accuracy"]


def test_every_command_explains_itself(run: Run) -> None:
    for command in ("quickstart", "train", "harden", "attack", "export", "recheck", "info", "recipes"):
        told = run(command, "--help")
        assert told.code == 0
        for option in ("--json", "--out", "--seed", "--device"):
            assert option in told.out, (command, option)
