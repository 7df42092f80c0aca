"""robustq attack: its lines, suites, adversarial images and their replay."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from robustq.checkpoint import load_model, save_model
from robustq.models.compiled import CompiledNetwork, check_compiler
from robustq.report.text import attack_lines
from robustq.workflow import attack as attacking
from robustq.workflow import prepared_target
from tests.cli.conftest import Run, check_refused
from tests.evaluation.budgets import small

FLAG = {
    "name": "logit scale",
    "raised": True,
    "text": "cross-entropy leaves 78.0%, rescaled logits leave 22.6%",
    "evidence": {"plain": 0.78},
    "doc": "docs/flags.md#logit-scale",
}


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustq.evaluation.run_suite.SUITES", {name: small(name) for name in ("standard", "paper")})


def found(**changed: Any) -> dict[str, Any]:
    """A result as attack prints it, with made-up numbers."""
    stages = [("white-box", "apgd-ce", 0.78), ("white-box", "pgd++", 0.226), ("diagnosis", "fgsm", 0.226)]
    return {
        "suite": "standard",
        "images": 1000,
        "epsilon": 8 / 255,
        "clean_accuracy": 0.9,
        "robust_accuracy": 0.226,
        "interval": [0.2, 0.25],
        "attacks": {"apgd-ce": 0.78},
        "stages": [{"stage": stage, "attack": name, "accuracy": share} for stage, name, share in stages],
        "gradient_steps": 12_345,
        "queries": 678,
        "twin_agreement": 1.0,
        "flags": [FLAG],
        "verdict": "upper bound: masking suspected",
        "not_judged_for": [],
        "notes": [],
        "seconds": 61.0,
        **changed,
    }


# --- lines -----------------------------------------------------------------------------------------------------------


def test_a_flag_is_printed_with_the_number() -> None:
    lines = attack_lines(found())
    assert lines[0] == "clean 90.0% · apgd-ce 78.0% · pgd++ 22.6%"
    assert lines[1].startswith("robust accuracy at most 22.6% [20.0, 25.0] at 8/255 · upper bound: masking suspected")
    assert lines[2] == f"  logit scale  {FLAG['text']}   (docs/flags.md#logit-scale)"
    assert lines[3] == "Do not quote 78.0%."
    assert lines[-1] == "cost    12,345 gradient steps, 678 queries, 61 s"


def test_a_clean_verdict_is_no_upper_bound() -> None:
    text = "\n".join(attack_lines(found(flags=[], verdict="no masking found")))
    assert "robust accuracy 22.6% [20.0, 25.0] at 8/255 · no masking found (worst case of 1,000 images" in text
    assert "at most" not in text and "Do not quote" not in text


def test_a_missing_verdict_says_why_and_which_suite_gives_one() -> None:
    few = "a verdict needs 200 images or more, these are 30"
    lines = attack_lines(found(flags=[], verdict="not judged", not_judged_for=[few]))
    assert f"not judged: {few}" in lines
    assert any(line.startswith("robust accuracy at most") for line in lines)
    lines = attack_lines(found(suite="recheck", flags=[], verdict="not judged", not_judged_for=[few]))
    assert f"not judged: {few}" in lines
    assert "  'robustq attack --suite standard' checks for masking, and may find a lower accuracy" in lines


def test_a_model_without_defence_is_called_so() -> None:
    fallen = found(robust_accuracy=0.001, flags=[], verdict="no masking found")
    assert "This model has no defence: the attack breaks 899 of 900 correctly classified images." in attack_lines(
        fallen
    )
    assert "no defence" not in "".join(attack_lines(found()))
    assert "no defence" not in "".join(attack_lines(found(robust_accuracy=0.0, clean_accuracy=0.0)))


# --- from the command line -------------------------------------------------------------------------------------------


def test_standard_is_the_default_and_its_images_replay(run: Run, digits_w4a4: Path, digits_float: Path) -> None:
    images = ("--images", "30", "--epsilon", "48/255")
    told = run(
        "attack", digits_w4a4, *images, "--control", digits_float, "--no-surrogates", "--json", "--out", "f.json"
    )
    assert told.code == 0, told.err
    result = told.json
    keys = "images clean_accuracy robust_accuracy interval attacks flags verdict seconds"
    assert set(keys.split()) <= result.keys()
    assert result == json.loads(Path("f.json").read_text())
    assert result["suite"] == "standard" and result["control"] and result["surrogates"] == []
    # 4-bit networks are attacked under every backward rule.
    assert {"apgd-ce", "apgd-ce (pass-through)", "apgd-ce (smooth)", "features", "square"} <= {
        stage["attack"] for stage in result["stages"]
    }
    assert not any(stage["attack"].startswith("transfer") for stage in result["stages"])
    assert {check["name"] for check in result["checks"]} >= {"harness", "noise", "twin", "zero gradient"}
    assert result["verdict"] in ("not judged", "upper bound: masking suspected")  # thirty images
    assert result["adversarial"] == str(Path("f.npz").absolute())
    assert result["queries"] == sum(stage["queries"] for stage in result["stages"])

    again = run("attack", digits_w4a4, "--replay", "f.npz", "--json")
    assert again.code == 0, again.err
    assert again.json["robust_accuracy"] == result["robust_accuracy"]
    assert again.json["clean_accuracy"] == result["clean_accuracy"]
    assert again.json["same_as_recorded"] == 1.0
    assert again.json["ball_checked"] is True
    other = run("attack", digits_float, "--replay", "f.npz")
    assert other.code == 0 and "replay  found on resnet8-w4a4 (robust accuracy " in other.out
    missed = run("attack", digits_w4a4, "--replay", "f.npz", "--require", "0.99")
    assert missed.code == 1 and "below the required" in missed.err
    check_refused(run("attack", digits_w4a4, *images, "--out", "f.json"), "exists already")


@pytest.mark.slow
def test_compiled_attack_generation_finds_the_same(
    run: Run, digits_w4a4: Path, digits_float: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs that torch.compile finds, run eagerly; integer sums turn a sign now and then."""
    compile_with(monkeypatch, "eager")
    barely_trained = ("--max-drift", "1")
    assert run("export", digits_w4a4, "--no-recheck", "--images", "20", *barely_trained, "--out", "bundle").code == 0
    how = ("attack", "bundle", "--images", "20", "--epsilon", "32/255", "--control", digits_float, "--json")
    plain, fast = run(*how), run(*how, "--compile", "--out", "f.json")
    assert plain.code == fast.code == 0, fast.err
    assert "4 kinds of passes are compiled" in fast.err and "compiled" not in plain.err
    assert (plain.json["compiled"], fast.json["compiled"]) == (False, True)
    assert fast.json["clean_accuracy"] == plain.json["clean_accuracy"]
    assert abs(fast.json["robust_accuracy"] - plain.json["robust_accuracy"]) <= 1 / 20
    assert fast.json["twin_agreement"] == plain.json["twin_agreement"] == 1.0
    again = run("attack", "bundle", "--replay", "f.npz", "--json").json
    assert again["judge"] == "onnxruntime" and again["robust_accuracy"] == fast.json["robust_accuracy"]


def test_a_compiler_that_fails_is_one_line_and_writes_nothing(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no compiler today")

    compile_with(monkeypatch, refuse)
    done = run("attack", digits_w4a4, "--images", "30", "--compile", "--out", "f.json")
    assert done.code == 2
    assert done.err.strip().splitlines()[-1] == (
        "robustq: torch.compile does not work here (no compiler today); attack without it: --no-compile"
    )
    assert not list(Path().iterdir())  # nor was a control trained


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(prepared_target, "CompiledNetwork", functools.partial(CompiledNetwork, backend=backend))
    monkeypatch.setattr(attacking, "check_compiler", functools.partial(check_compiler, backend=backend))


def test_require_exits_with_1_below_it_and_on_a_flag(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = ("attack", digits_w4a4, "--images", "20", "--epsilon", "0")
    accuracy = run(*clean, "--json").json["robust_accuracy"]
    assert accuracy > 0 and run(*clean, "--require", str(accuracy)).code == 0
    missed = run(*clean, "--require", str(accuracy + 0.01), "--json")
    assert missed.code == 1 and missed.json["robust_accuracy"] == accuracy
    assert missed.err.strip().splitlines()[-1].startswith("robustq: robust accuracy")
    monkeypatch.setattr("robustq.workflow.attack.attack_model", lambda *_, **__: found())
    fallen = run("attack", digits_w4a4, "--require", "0.1")
    assert fallen.code == 1 and fallen.err.strip().endswith("flags raised: logit scale")
    assert "Do not quote 78.0%." in fallen.out
    assert run("attack", digits_w4a4).code == 0


def test_a_replay_of_images_that_were_wrong_before_the_attack_requires_nothing(run: Run, digits_float: Path) -> None:
    """Of a network near chance most images stay clean, and any better network is right on them."""
    network, spec, _ = load_model(digits_float)
    with torch.no_grad():
        network.get_parameter("fc.bias")[:8] -= 1e3  # these classes are never answered
    save_model(Path("broken.pt"), network, spec)
    few = ("--suite", "paper", "--no-surrogates", "--images", "30", "--device", "cpu")
    found = run("attack", "broken.pt", *few, "--epsilon", "1/255", "--save-adversarial", "a.npz", "--json").json
    wrong = 30 - round(30 * found["clean_accuracy"])
    assert wrong > 15
    told = run("attack", digits_float, "--replay", "a.npz", "--require", "0.01")
    said = f"{wrong} of 30 images of a.npz were wrong before any attack and are clean, so that they prove nothing"
    assert told.code == 1 and said in told.err
    assert f"WARNING {wrong} of 30 images are clean: the attack left them as they were" in told.out


@pytest.fixture
def saved(run: Run, digits_float: Path) -> Path:
    few = ("--suite", "paper", "--no-surrogates", "--images", "20", "--epsilon", "16/255")
    assert run("attack", digits_float, *few, "--save-adversarial", "p.npz", "-q").code == 0
    return Path("p.npz").absolute()


def changed(path: Path, **arrays: Any) -> str:
    with np.load(path) as archive:
        content = {**{name: archive[name] for name in archive.files}, **arrays}
    np.savez_compressed("changed.npz", **content)
    return "changed.npz"


def test_a_replay_of_other_images_is_refused(run: Run, digits_float: Path, saved: Path) -> None:
    with np.load(saved) as archive:
        x_adv, labels, places = archive["x_adv"], archive["labels"], archive["places"]
    cases = {
        "the ball": {"x_adv": x_adv ^ 128},
        "sha256 differs": {"labels": (labels + 1) % 10},
        "has test image 9999": {"places": places + 9999 - places.max()},
        "the model takes (1, 8, 8)": {"x_adv": x_adv[..., :6]},
        "labels that the model does not have": {"labels": labels + 10},
    }
    for told, arrays in cases.items():
        check_refused(run("attack", digits_float, "--replay", changed(saved, **arrays)), told)


def test_a_replay_on_a_lone_file_needs_no_gradient(run: Run, bundle: Path, saved: Path) -> None:
    (file,) = bundle.glob("*.onnx")
    whole = run("attack", bundle, "--replay", saved, "--json").json
    alone = run("attack", file, "--replay", saved, "--json").json
    assert alone["judge"] == "onnxruntime" and alone["ball_checked"]
    for key in ("clean_accuracy", "robust_accuracy", "same_as_recorded", "data"):
        assert alone[key] == whole[key], key

    foreign = onnx.load(file)  # its data are those of the images
    del foreign.metadata_props[:]
    onnx.save(foreign, "foreign.onnx")
    again = run("attack", "foreign.onnx", "--replay", saved, "--input", "unit", "--json").json
    assert again["robust_accuracy"] == whole["robust_accuracy"] and again["label"] == "foreign"


def test_images_whose_data_are_missing_are_replayed_all_the_same(
    run: Run, digits_float: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustq.errors import DataError

    def gone(*_: Any, **__: Any) -> None:
        raise DataError("digits is not there")

    whole = run("attack", digits_float, "--replay", saved, "--json").json
    monkeypatch.setattr("robustq.workflow.replay.data_for", gone)
    told = run("attack", digits_float, "--replay", saved, "--json")
    assert told.code == 0
    assert told.json["ball_checked"] is False and told.json["clean_accuracy"] is None
    assert told.json["attacks"] == whole["attacks"]
    shown = run("attack", digits_float, "--replay", saved)
    assert "the ball was not checked" in shown.out and "clean -" in shown.out
    assert run("attack", digits_float, "--replay", saved, "--data", "digits").code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--epsilons", "8/255,8"), "epsilon '8' is outside [0, 1]"),
        (("--epsilons", "0.001"), "below one grey level"),
        (("--replay", "none.npz"), "none.npz: no such file"),
        (("--replay", "none.npz", "--epsilon", "8/255"), "--epsilon has no effect with --replay"),
        (("--surrogate", "none.pt"), "none.pt: no such file"),
        (("--out", "found.npz"), "--out found.npz is a JSON file"),
        (("--save-adversarial", "/dev/null/found.npz"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(
    run: Run, digits_float: Path, arguments: tuple[str, ...], told: str
) -> None:
    check_refused(run("attack", digits_float, *arguments), told)
    assert list(Path.cwd().iterdir()) == []
