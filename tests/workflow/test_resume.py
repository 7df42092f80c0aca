"""--resume from outside: whole runs on the digits, stopped by a signal, and everything that may have changed since."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robustq
from robustq import progress
from robustq.checkpoint import load_model
from robustq.data import Batch
from robustq.errors import DataError, ModelFileError, RunStoppedError, UsageError
from robustq.hardening.metrics import MACHINE_KEYS
from robustq.hardening.trainer import Training
from robustq.workflow import setup as setting

KEYS = ("epochs=2", "train_images=150", "batch_size=64", "monitor_images=10")
REHEARSED = 3
"""Steps that the forecast takes before the first step of the run."""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send this process SIGINT when the run (or each resumed one) takes its n-th step; 0: never."""
    taken = {"at": 0, "steps": 0}
    take_step = Training.take_step

    def counted(self: Training, batch: Batch) -> torch.Tensor:
        taken["steps"] += 1
        if taken["steps"] == taken["at"]:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, batch)

    monkeypatch.setattr(Training, "take_step", counted)

    def at(step: int, *, rehearsed: int = REHEARSED) -> None:
        taken.update(at=step + rehearsed if step else 0, steps=0)

    return at


def contents(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in MACHINE_KEYS:
            del row[key]
    return {"rows": rows, **{name: load_model(run / name)[0].state_dict() for name in ("best.pt", "last.pt")}}


def assert_same_run(first: Path, second: Path) -> None:
    one, other = contents(first), contents(second)
    assert one["rows"] == other["rows"]
    for name in ("best.pt", "last.pt"):
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key]), (name, key)  # bit for bit


def test_a_hardening_run_stopped_twice_is_the_run_left_alone(digits_float: Path, signal_at: Any) -> None:
    def harden(out: str) -> Any:
        return robustq.harden_model(digits_float, bits=4, overrides=KEYS, device="cpu", out=Path(out))

    alone = harden("alone")
    signal_at(2)
    with pytest.raises(RunStoppedError, match=r"stopped after batch 2 of 3 in epoch 1 of 2; .*harden --resume stopped"):
        harden("stopped")
    signal_at(3, rehearsed=1)  # one batch is left in the first epoch: this is the second of the next
    with pytest.raises(RunStoppedError, match=r"stopped after batch 2 of 3 in epoch 2 of 2"):
        robustq.resume_run("stopped")
    assert Path("runs/last-hardened").read_text().strip() == str(Path("alone").absolute())  # not half a run
    signal_at(0)
    resumed = robustq.resume_run(Path("stopped"))
    assert_same_run(Path("alone"), Path("stopped"))
    differ = {key for key in alone if alone[key] != resumed[key]}
    assert differ <= {"checkpoint", "run", "seconds_per_epoch", "size_bytes"}
    assert json.loads(Path("stopped/result.json").read_text()) == resumed
    assert Path("runs/last-hardened").read_text().strip() == str(Path("stopped").absolute())
    with pytest.raises(UsageError, match="has finished, nothing is left"):
        robustq.resume_run("stopped")


def stopped_train(signal_at: Any, *, data: str = "digits", out: str = "run") -> Path:
    signal_at(2)
    with pytest.raises(RunStoppedError):
        robustq.train_model("natural", overrides=KEYS, data=data, architecture="resnet8", device="cpu", out=Path(out))
    signal_at(0)
    return Path(out)


def test_a_second_signal_stops_at_once_and_the_saved_state_stands(
    signal_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Training.take_step
    steps = []

    def twice(self: Training, batch: Batch) -> torch.Tensor:
        steps.append(1)
        if len(steps) == REHEARSED + 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, batch)

    monkeypatch.setattr(Training, "take_step", twice)
    with pytest.raises(
        RunStoppedError, match=r"stopped at once; saved: epoch 1; resume with: robustq train --resume run"
    ):
        robustq.train_model(
            "natural", overrides=KEYS, data="digits", architecture="resnet8", device="cpu", out=Path("run")
        )
    monkeypatch.setattr(Training, "take_step", take_step)
    assert robustq.resume_run("run")["epochs_done"] == 2


def write_npz(path: Path, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 180), ("test", 30)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 3
    np.savez(path, **arrays)


def test_data_that_changed_or_is_gone_is_refused_and_moved_data_is_named(signal_at: Any) -> None:
    write_npz(Path("data.npz"), seed=0)
    run = stopped_train(signal_at, data="data.npz")
    before = (run / "resume.pt").read_bytes()
    Path("data.npz").rename("moved.npz")
    with pytest.raises(DataError, match=r"data\.npz"):
        robustq.resume_run(run)
    write_npz(Path("data.npz"), seed=1)
    with pytest.raises(DataError, match="is not the data that the run began with"):
        robustq.resume_run(run)
    assert (run / "resume.pt").read_bytes() == before
    assert not (run / "run.lock").exists()
    assert robustq.resume_run(run, data="moved.npz")["epochs"] == 2


def test_what_changed_since_is_told(
    digits_float: Path, signal_at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path("source.pt")
    source.write_bytes(digits_float.read_bytes())
    signal_at(2)
    with pytest.raises(RunStoppedError):
        robustq.harden_model(source, bits=4, recipe="natural", overrides=KEYS, device="cpu", out=Path("run"))
    signal_at(0)
    source.write_bytes(b"another model")
    now = setting.versions()
    monkeypatch.setattr("robustq.workflow.resume.versions", lambda: {**now, "torch": "9.9"})
    progress.show(True)
    try:
        robustq.resume_run("run")
    finally:
        progress.show(False)
    told = capsys.readouterr().err
    assert f"torch was {now['torch']} when the run began, and is 9.9" in told
    assert "source.pt has changed since the run began" in told
    assert "the last 2 of 2 epochs" in told


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda config: config["recipe"].update(momentun=0.5), UsageError, "'momentun' is unknown"),
        (lambda config: config["recipe"].update(epochs=3.5), UsageError, "epochs = 3.5 is not an integer"),
        (lambda config: config["recipe"].update(epochs=9), ModelFileError, "recipe.epochs is 9, and 2 in resume.pt"),
        (lambda config: config["spec"].update(weight_bits=7), ModelFileError, "spec.weight_bits is 7, and 32"),
        (lambda config: config["spec"].update(architecture="resnet20"), ModelFileError, "spec.architecture is"),
        (lambda config: config.update(seed=1), ModelFileError, "seed is 1, and 0"),
        (lambda config: config.update(data=None), UsageError, "'data' is missing"),
        (lambda config: config["recipe"].update(tensorboard=True), UsageError, "needs the package tensorboard"),
    ],
)
def test_a_config_that_was_changed_is_refused_and_no_file_changes(
    signal_at: Any, monkeypatch: pytest.MonkeyPatch, change: Any, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr("robustq.hardening.metrics.importlib.util.find_spec", lambda _: None)
    run = stopped_train(signal_at)
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))
    refused(run, error, words)


def refused(run: Path, error: type[Exception], words: str) -> None:
    before = {file: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(error, match=words):
        robustq.resume_run(run)
    assert {file: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("optimizer"), "optimizer is missing"),
        (lambda state: state.pop("standing"), "standing is missing"),
        (lambda state: state["standing"].pop("rows"), "standing.rows is missing"),
        (lambda state: state["standing"].update(epoch="1"), "standing.epoch is missing"),
        (lambda state: state["totals"]["sums"].clear(), "totals.sums.(loss|train_accuracy) is missing"),
        (lambda state: state.update(random=torch.zeros(3)), "random is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_no_file_changes(signal_at: Any, change: Any, words: str) -> None:
    run = stopped_train(signal_at)
    content = torch.load(run / "resume.pt", weights_only=True)
    change(content["state"])
    torch.save(content, run / "resume.pt")
    refused(run, ModelFileError, words)


def test_a_state_of_an_older_version_without_its_config_is_resumed(signal_at: Any) -> None:
    run = stopped_train(signal_at)
    content = torch.load(run / "resume.pt", weights_only=True)
    del content["config"]
    torch.save(content, run / "resume.pt")
    assert robustq.resume_run(run)["epochs_done"] == 2


def test_the_same_run_is_not_trained_twice_unnoticed(signal_at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    progress.show(True)
    try:
        run = stopped_train(signal_at, out="runs/first")
        stopped_train(signal_at, out="runs/second")
        assert (
            f"the same run was started in {run}; resume it with: robustq train --resume {run}"
            in capsys.readouterr().err
        )
        robustq.resume_run(run)
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note ")]
        assert len(notes) == 1 and "runs/second" in notes[0]  # of the other one, and not of itself
        stopped_train(signal_at, out="runs/third")
        assert f"the same run has finished in {run}: {run / 'best.pt'}" in capsys.readouterr().err
        with pytest.raises(RunStoppedError):  # another seed is another run
            signal_at(2)
            robustq.train_model("natural", overrides=KEYS, data="digits", architecture="resnet8", device="cpu", seed=1)
        assert "the same run" not in capsys.readouterr().err
    finally:
        progress.show(False)
