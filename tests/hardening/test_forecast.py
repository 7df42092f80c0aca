"""The forecast is measured on steps that are taken back: the run that follows has the bits of one without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.hardening import forecast as forecasting
from robustq.hardening.forecast import copied, forecast
from robustq.hardening.optimization import TrainStep
from robustq.hardening.run_folder import RESUME, RunFolder
from robustq.hardening.state import StopRequest
from robustq.models.spec import ModelSpec
from tests.hardening.memory_checkpointer import MemoryCheckpointer
from tests.hardening.test_resume import begun, same, uninterrupted


@pytest.mark.parametrize(
    ("method", "bits", "keys"),
    [
        ("natural", 4, {}),
        ("odgq", 0, {"global_perturbation": "noise"}),  # a generator of the method's own, and dropout's
        ("odgq", 0, {"tied_to": "sample", "update": "epoch"}),
    ],
)
def test_nothing_is_left_of_the_rehearsal(method: str, bits: int, keys: dict[str, Any]) -> None:
    training, _ = begun(method, bits, keys, init=0)
    before = copied(training.state_dict())
    forecast(training)
    same(copied(training.state_dict()), before)
    keeper = MemoryCheckpointer()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    training.run(keeper, StopRequest())
    same(keeper.load(), uninterrupted(method, bits, keys))


def test_copies_are_copies() -> None:
    tensor = torch.zeros(2)
    state = {"a": tensor, "b": [{"c": tensor, "d": None, "e": 3}]}
    copy = copied(state)
    tensor.fill_(1)
    assert copy == {"a": copy["a"], "b": [{"c": copy["b"][0]["c"], "d": None, "e": 3}]}
    assert not copy["a"].any() and not copy["b"][0]["c"].any()


def test_time_is_counted_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "_time_steps", lambda training: 10.0)
    training, _ = begun("natural", 0, {}, init=0)
    whole = forecast(training).seconds
    assert 60 <= whole < 61  # six steps; watching ten images once or twice takes next to nothing
    for batch in training.epoch_batches():
        training.take_step(batch)
        break
    assert 50 <= forecast(training).seconds < 51


def test_a_run_with_two_epochs_left_and_one_with_none() -> None:
    training, _ = begun("natural", 0, {}, init=0)
    assert 0 < forecast(training).seconds < 60
    training.state.step = 3  # the epoch lacks nothing but the monitor
    assert 0 <= forecast(training).seconds < 60


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_the_disk_is_what_the_files_take(options: dict[str, Any], tmp_path: Path) -> None:
    training, _ = begun("odgq", 4, {"domains": 3}, init=0)
    training.recipe = replace(training.recipe, **options)
    training.descent = TrainStep(training.model, training.method, training.recipe)
    told = forecast(training)
    spec = ModelSpec("resnet8", 4, 4, 10, 1, 8, "digits", 0.1, tuple("0123456789"))
    config = {
        "command": "train",
        "recipe": {"name": "t", "method": "odgq", "epochs": 2},
        "spec": spec.to_dict(),
        "seed": 0,
        "versions": {},
    }
    with RunFolder.create(tmp_path / "run", config, training.state_dict()) as folder:
        training.run(folder, StopRequest())
        size = sum(file.stat().st_size for file in folder.path.iterdir())
        # Names and alignment in torch's archives: a fifth at this tiny size.
        assert told.disk_bytes <= size <= 1.3 * told.disk_bytes + 50_000
        state = (folder.path / RESUME).stat().st_size
        assert told.spare_bytes <= state <= 1.3 * told.spare_bytes + 50_000


def test_memory_is_that_of_this_process() -> None:
    training, _ = begun("natural", 0, {}, init=0)
    # torch alone takes over 100 MB, and no test machine has a terabyte.
    assert 1e8 < forecast(training).memory_bytes < 1e12
