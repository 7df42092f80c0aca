"""Calls the command line in this process, in an empty folder: a call costs milliseconds instead of a start of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from robustq.cli.program import main


@dataclass(frozen=True)
class Outcome:
    """Exit code, stdout and stderr of one call."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


Run = Callable[..., Outcome]

FAST_TRAIN = ("--set", "epochs=1", "--set", "train_images=100", "--set", "monitor_images=50", "--device", "cpu")
"""An epoch in a second."""


def check_refused(outcome: Outcome, expected: str) -> None:
    """Exit 2 and one line on stderr, which has ``expected``."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert outcome.err.startswith("robustq: ") and expected in outcome.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run("harden", path, "--bits", "4")``."""
    workplace = tmp_path / "here"
    workplace.mkdir()
    monkeypatch.chdir(workplace)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["robustq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def bundle(digits_w4a4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder of the hardened digits model."""
    import robustq

    out = tmp_path_factory.mktemp("exported") / "bundle"
    robustq.export_model(digits_w4a4, images=10, recheck=False, device="cpu", out=out)
    return out


@pytest.fixture(scope="session")
def float_bundle(digits_float: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder of the float digits model."""
    import robustq

    out = tmp_path_factory.mktemp("exported") / "float"
    robustq.export_model(digits_float, format_name="float", images=10, recheck=False, device="cpu", out=out)
    return out


@pytest.fixture(scope="session")
def adversarial(digits_w4a4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adversarial images of the hardened digits model."""
    import robustq

    file = tmp_path_factory.mktemp("found") / "adversarial.npz"
    robustq.attack_model(digits_w4a4, suite="recheck", images=10, device="cpu", save_adversarial=file)
    return file
