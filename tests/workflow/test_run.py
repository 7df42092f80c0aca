"""A run before it begins and when it cannot go on: names that two take at once, memory, disk, and what is cheaper."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robustq
from robustq.errors import NotFiniteError, OutOfMemoryError, OutputError, RunStoppedError
from robustq.files import free_path
from robustq.hardening.methods.method import Step
from robustq.hardening.methods.natural import Natural
from robustq.hardening.run_folder import RUNS, RunFolder
from robustq.workflow import run_log, training_run

KEYS = ("epochs=2", "train_images=150", "batch_size=64", "monitor_images=10")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(**keys: Any) -> Any:
    return robustq.train_model("natural", overrides=KEYS, data="digits", architecture="resnet8", device="cpu", **keys)


def test_a_default_name_that_another_run_takes_in_this_moment_gets_the_next_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Path] = []

    def raced(wanted: Path) -> Path:
        path = free_path(wanted)
        if not found:
            path.mkdir(parents=True)
            (path / "config.json").write_text("{}")  # the other run
        found.append(path)
        return path

    monkeypatch.setattr(training_run, "free_path", raced)
    result = train()
    assert [path.name for path in found] == ["resnet8-float-natural", "resnet8-float-natural-2"]
    assert Path(result["run"]).name == "resnet8-float-natural-2"
    assert (found[0] / "config.json").read_text() == "{}"
    assert sorted(path.name for path in RUNS.iterdir()) == sorted(path.name for path in found)


@pytest.fixture
def starving(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Training steps run out of memory above so many images, from so manyth step on."""

    def starve(limit: int, *, after: int = 0) -> None:
        loss = Natural.loss
        steps: list[int] = []

        def step(self: Natural, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
            steps.append(len(x))
            if len(x) > limit and len(steps) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return loss(self, x, x_adv, y, places)

        monkeypatch.setattr(Natural, "loss", step)

    return starve


def test_out_of_memory_is_found_before_anything_is_written(starving: Any) -> None:
    starving(20)  # a quarter more than the batch that is named
    with pytest.raises(OutOfMemoryError, match=r"batches of 64 images; a batch of 16 fits: --set batch_size=16$"):
        train()
    assert list(Path.cwd().iterdir()) == []


def test_out_of_memory_later_names_both_ways_on(starving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.cwd()
    starving(20, after=3 + 4)  # three steps of the forecast, three of the first epoch, one of the second
    with pytest.raises(OutOfMemoryError, match=r"in epoch 2 .* a batch of 16 fits.*go on: robustq train --resume run$"):
        train(out=Path("run"))
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert robustq.resume_run("run")["epochs"] == 2


def test_calibration_that_does_not_fit_names_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training_run, "calibrate", full)
    with pytest.raises(OutOfMemoryError, match=r"512 images calibrate .* --set calibration_images=128"):
        train()
    assert list(Path.cwd().iterdir()) == []


def test_a_method_that_does_not_fit_is_told_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(training_run, "build_method", full)
    with pytest.raises(OutOfMemoryError, match="before the first batch; lower --set batch_size=64"):
        train()
    assert list(Path.cwd().iterdir()) == []


def test_a_disk_that_is_too_small_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OutputError, match=r"runs: has 1,000 kB free, the run writes 2,\d\d\d kB"):
        train()
    assert list(Path.cwd().iterdir()) == []


def test_nan_stops_the_run_and_keeps_the_good_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Natural.loss
    steps: list[int] = []

    def step(self: Natural, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        steps.append(1)
        found = loss(self, x, x_adv, y, places)
        # The second step of the second epoch; then the repetition of the first two.
        broken = len(steps) in (3 + 3 + 2, 3 + 3 + 3 + 2)
        return Step(found.loss * float("nan"), found.terms, found.logits) if broken else found

    monkeypatch.setattr(Natural, "loss", step)
    with pytest.raises(NotFiniteError, match=r"^run: the loss became nan in step 2 of epoch 2; .*what was saved"):
        train(out=Path("run"))
    with RunFolder.reopen(Path("run")) as folder:
        assert folder.load()["standing"]["epoch"] == 1
        assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1
        assert {"best.pt", "last.pt"} <= {path.name for path in folder.path.iterdir()}


def test_ctrl_c_while_the_test_images_are_counted_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training_run, "accuracy_on_test", interrupted)
        with pytest.raises(RunStoppedError, match=r"stopped at once; saved: epoch 2; go on with: robustq train"):
            train(out=Path("run"))
    assert robustq.resume_run("run")["epochs"] == 2  # nothing is left but to count


def test_a_gpu_that_is_left_unused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"source": None, "data": {"digest": ""}, "command": "", "augment": {}, "seed": 0, "spec": {}, "recipe": {}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (line,) = run_log.hints(config, torch.device("cpu"))
    assert "--device cuda" in line
    assert run_log.hints(config, torch.device("cuda:0")) == []


def test_a_precision_without_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {
        "source": None,
        "data": {"digest": ""},
        "command": "",
        "augment": {},
        "seed": 0,
        "spec": {},
    }
    config["recipe"] = {"precision": "bfloat16"}
    found = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    (line,) = run_log.hints(config, torch.device("cpu"))
    assert "no instructions for bfloat16" in line and "--set precision=float32" in line
    found["avx512_bf16"] = True
    assert run_log.hints(config, torch.device("cpu")) == []


def test_folders_of_other_kinds_are_passed_over_in_the_search(tmp_path: Path) -> None:
    config = {"source": None, "data": {"digest": ""}, "command": "", "augment": {}, "seed": 0, "spec": {}, "recipe": {}}
    for name, text in (("broken", "{"), ("list", "[]"), ("old", '{"recipe": {}, "spec": {}, "seed": 0}')):
        (RUNS / name).mkdir(parents=True)
        (RUNS / name / "config.json").write_text(text)
    assert run_log.hints(config, torch.device("cpu")) == []


def test_ctrl_c_after_the_last_file_says_that_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = RunFolder.finish

    def interrupted(self: RunFolder, result: dict[str, Any]) -> None:
        finish(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "finish", interrupted)
    with pytest.raises(RunStoppedError, match=r"stopped, but the run has finished: run/best\.pt"):
        train(out=Path("run"))
