"""Robust accuracy that collapses, and TensorBoard, on the command line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from robustq.hardening.monitor import HoldoutAccuracy, Monitor
from tests.cli.conftest import Run
from tests.hardening.test_metrics import FakeWriter

TINY = ("--set", "epochs=5", "--set", "train_images=150", "--set", "monitor_images=100", "--device", "cpu")


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Robust on every held-out image in the first epoch, on none afterwards."""
    watch = Monitor.evaluate
    seen: list[int] = []

    def fall(self: Monitor, model: nn.Module) -> HoldoutAccuracy:
        seen.append(1)
        return HoldoutAccuracy(watch(self, model).clean, 1.0 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Monitor, "evaluate", fall)


@pytest.mark.usefixtures("falling")
def test_a_collapse_ends_the_run_with_exit_1_and_the_best_weights(run: Run, digits_float: Path) -> None:
    stopped = run("harden", digits_float, "--bits", "8", *TINY, "--out", "run", "--json")
    assert stopped.code == 1, stopped.err
    found = stopped.json
    assert found["collapsed"] == {"epoch": 3, "robust": 0.0, "best_epoch": 1, "best": 1.0, "planned": 5}
    assert (found["epochs"], found["epochs_done"], found["best_epoch"]) == (5, 3, 1)
    last = stopped.err.strip().splitlines()[-1]
    assert last.startswith("robustq: run: robust accuracy collapsed (catastrophic overfitting): PGD-10 0.0%")
    assert "stopped after 3 of 5 epochs, best.pt is of epoch 1" in last
    assert found["shortfalls"] == [last.removeprefix("robustq: ")]
    assert json.loads(Path("run/result.json").read_text()) == found
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert run("info", found["checkpoint"], "--json").json["info"]["epoch"] == 1
    assert "FAILED  run: robust accuracy collapsed" in run("info", "run").out
    resumed = run("harden", "--resume", "run")
    assert resumed.code == 2
    last = resumed.err.strip().splitlines()[-1]
    assert "run has finished after 3 of 5 epochs, since robust accuracy collapsed" in last
    assert "--set stop_on_collapse=false" in last and last.endswith("best.pt")


@pytest.mark.usefixtures("falling")
def test_people_are_told_and_can_go_on_regardless(run: Run, digits_float: Path) -> None:
    stopped = run("harden", digits_float, "--bits", "8", *TINY)
    assert stopped.code == 1
    assert "(epoch 1 of 3; held out: " in stopped.out
    again = run("harden", digits_float, "--bits", "8", *TINY, "--set", "stop_on_collapse=false", "--json")
    assert again.code == 0, again.err
    assert (again.json["collapsed"], again.json["shortfalls"], again.json["epochs_done"]) == (None, [], 5)


TRAIN = ("train", "--data", "digits", "--arch", "resnet8", *TINY, "--set", "epochs=1", "--tensorboard")


def test_tensorboard_is_asked_for_before_anything_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustq.hardening.metrics.importlib.util.find_spec", lambda name: None)
    refused = run(*TRAIN)
    assert refused.code == 2
    assert refused.err.strip().splitlines()[-1].startswith("robustq: tensorboard = true needs the package tensorboard")
    assert not Path("runs").exists()


def test_tensorboard_has_the_rows_of_metrics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setattr(FakeWriter, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("robustq.hardening.metrics.importlib.util.find_spec", lambda name: module)
    done = run(*TRAIN, "--json")
    assert done.code == 0, done.err
    folder = Path(done.json["run"])
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (writer,) = FakeWriter.made
    assert writer.file.parent.absolute() == folder / "tensorboard" and writer.closed
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "epoch"}
    assert {key: value for key, value, step in writer.scalars if step == 1} == numbers
    assert {"loss", "feature_norm", "images_per_second", "peak_memory_bytes"} <= numbers.keys()
