"""Ctrl-C on the command line: exit 130 and one line, whatever it interrupts; and what may stand beside --resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from robustq.data import Batch
from robustq.hardening.trainer import Training

TINY = ("--set", "epochs=2", "--set", "train_images=150", "--set", "monitor_images=10", "--device", "cpu")
TRAIN = ("train", "--data", "digits", "--architecture", "resnet8", *TINY)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send SIGINT to this process when the run takes its n-th step, the three of the forecast included."""

    def at(step: int) -> None:
        steps: list[int] = []
        take_step = Training.take_step

        def counted(self: Training, batch: Batch) -> Any:
            steps.append(1)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGINT)
            return take_step(self, batch)

        monkeypatch.setattr(Training, "take_step", counted)

    return at


def last_line(outcome: Any) -> str:
    assert "Traceback" not in outcome.err
    return str(outcome.err.strip().splitlines()[-1])


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(run: Any, interrupted: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted(5)
    stopped = run(*TRAIN, "--json")
    assert stopped.code == 130
    assert stopped.out == ""
    (run_folder,) = Path("runs").iterdir()
    assert last_line(stopped).startswith("robustq: stopped after batch ")
    assert last_line(stopped).endswith(f"go on with: robustq train --resume {run_folder}")
    assert "safe    Ctrl-C saves and stops" in stopped.err
    assert "takes   about" in stopped.err
    again = run(*TRAIN)  # the fixture's step is past
    assert f"the same run has begun in {run_folder}" in again.err
    resumed = run("train", "--resume", run_folder, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["epochs"] == 2
    finished = run("harden", "--resume", run_folder)
    assert finished.code == 2
    assert "has finished, nothing is left" in last_line(finished)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_step_writes_nothing(run: Any, interrupted: Any) -> None:
    interrupted(2)  # while the forecast is measured
    stopped = run(*TRAIN)
    assert stopped.code == 130
    assert last_line(stopped) == "robustq: stopped; nothing half-written is left behind"
    assert list(Path.cwd().rglob("*")) == []


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_ctrl_c(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_imported(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("partially initialized module") from None

    monkeypatch.setattr("robustq.workflow.train.train_model", half_imported)
    stopped = run(*TRAIN)
    assert stopped.code == 130
    assert last_line(stopped).startswith("robustq: stopped")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "--resume", "run", "--bits", "4"), "--bits"),
        (("train", "--resume", "run", "--recipe", "natural", "--seed", "0"), "--recipe, --seed"),
        (("harden", "model.pt", "--resume", "run"), "MODEL"),
        (("harden", "--resume", "run", "--set", "epochs=3"), "--set"),
        (("harden", "--resume", "run", "--out", "other"), "--out"),
    ],
)
def test_what_the_folder_says_already_is_refused_beside_resume(
    run: Any, arguments: tuple[str, ...], named: str
) -> None:
    refused = run(*arguments)
    assert refused.code == 2
    assert last_line(refused) == (
        f"robustq: {named} beside --resume: the run folder says it already; leave it out, or start a new run"
    )


def test_nothing_to_resume(run: Any) -> None:
    missing = run("train", "--resume", "runs/none", "--device", "cpu", "--data", "digits", "--json", "--quiet")
    assert missing.code == 2
    assert last_line(missing).startswith("robustq: runs/none: no such folder")
