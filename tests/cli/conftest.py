"""Calls the command line in this process, in an empty folder: a call costs milliseconds instead of a start of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from robustq.cli import main


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
