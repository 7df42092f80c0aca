"""--model, --arch and --feature-layer on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from robustq import cli
from robustq.checkpoint import save_model
from robustq.models.spec import ModelSpec, build_model
from tests.workflow.test_custom_model import CODE


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["robustq", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """module:function in the current folder, beside model.pt that it built."""
    name = f"command_nets_{abs(hash(str(tmp_path))):x}"
    (tmp_path / f"{name}.py").write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    architecture = f"{name}:build"
    spec = ModelSpec(architecture, 4, 4, 10, 1, 8, "digits", None, tuple("0123456789"))
    save_model(tmp_path / "model.pt", build_model(spec, own_model=architecture), spec)
    return architecture


@pytest.mark.parametrize("command", [["info"], ["harden", "--bits", "8"]])
def test_without_the_name_no_code_runs(
    own: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command[0], "model.pt", *command[1:]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"model.pt: was built by {own}; add --model {own} to run that code")


def test_with_the_name_it_does(own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "info", "model.pt", "--model", own, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == own and found["weight_bits"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--data", "digits", "--arch", "torchvision:resnet81"],
            "no classifier 'resnet81'",
        ),
        (["train", "--data", "digits", "--arch", "nets:build"], "give it as --model nets:build"),
        (["harden", "--resume", "nowhere", "--model", "{own}"], "nowhere: "),
        (["harden", "model.pt", "--bits", "4", "--arch", "torchvision:resnet18"], "add --model"),
        (["train", "--data", "digits", "--model", "{own}", "--feature-layer", "dws"], "has no such layer; nearest: dw"),
    ],
)
def test_bad_input_is_one_line(
    own: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *(argument.format(own=own) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("robustq: ") and message in error
    assert not Path("runs").exists()
