"""A training run: its teacher, what is found before it begins, and how it ends when it cannot continue."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robustq
from robustq import progress
from robustq.checkpoint import load_model, save_model
from robustq.data import Augment, Batch, load_dataset
from robustq.errors import (
    DataError,
    ModelFileError,
    NotFiniteError,
    OutOfMemoryError,
    OutputError,
    RobustqError,
    RunStoppedError,
    UsageError,
)
from robustq.files import free_path
from robustq.hardening.methods.method import LossOutput
from robustq.hardening.methods.natural import Natural
from robustq.hardening.methods.rslad import CachedTeacher, OnlineTeacher
from robustq.hardening.run_folder import RUNS, RunFolder
from robustq.hardening.trainer import Training
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe
from robustq.workflow import run_log, training_run
from robustq.workflow.teacher import open_teacher, with_absolute_teacher

KEYS = ("epochs=2", "train_images=150", "batch_size=64", "monitor_images=10")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(recipe: str = "natural", *settings: str, **keys: Any) -> Any:
    """A float network of the digits, from scratch."""
    return robustq.train_model(
        recipe, overrides=(*KEYS, *settings), data="digits", architecture="resnet8", device="cpu", **keys
    )


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

        def step(self: Natural, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> LossOutput:
            steps.append(len(x))
            if len(x) > limit and len(steps) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return loss(self, x, x_adv, y, places)

        monkeypatch.setattr(Natural, "loss", step)

    return starve


def test_out_of_memory_is_found_before_anything_is_written(starving: Any) -> None:
    starving(24)  # half as much again as the batch that is named
    with pytest.raises(OutOfMemoryError, match=r"batches of 64 images; a batch of 8 fits: --set batch_size=8$"):
        train()
    assert list(Path.cwd().iterdir()) == []


def test_out_of_memory_later_names_both_ways_on(starving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.cwd()
    starving(24, after=3 + 4)  # three steps of the forecast, three of the first epoch, one of the second
    with pytest.raises(OutOfMemoryError, match=r"in epoch 2 .* batch of 8 fits.*resume: robustq train --resume run$"):
        train(out=Path("run"))
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert robustq.resume_run("run")["epochs"] == 2


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("calibrate", r"512 images calibrate .* --set calibration_images=128"),
        ("build_method", "before the first batch; lower --set batch_size=64"),
    ],
)
def test_a_part_that_does_not_fit_names_its_own_key(monkeypatch: pytest.MonkeyPatch, part: str, words: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training_run, part, full)
    with pytest.raises(OutOfMemoryError, match=words):
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

    def step(self: Natural, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> LossOutput:
        steps.append(1)
        found = loss(self, x, x_adv, y, places)
        # The second step of the second epoch; then the repetition of the first two.
        broken = len(steps) in (3 + 3 + 2, 3 + 3 + 3 + 2)
        return LossOutput(found.loss * float("nan"), found.terms, found.logits) if broken else found

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
        with pytest.raises(RunStoppedError, match=r"stopped at once; saved: epoch 2; resume with: robustq train"):
            train(out=Path("run"))
    assert robustq.resume_run("run")["epochs"] == 2  # nothing is left but to count


def config(**recipe: Any) -> dict[str, Any]:
    return {
        **{"source": None, "data": {"digest": ""}, "command": "", "augment": {}, "seed": 0, "spec": {}},
        "recipe": recipe,
    }


def test_folders_of_other_kinds_are_skipped_in_the_search_for_the_same_run() -> None:
    for name, text in (("broken", "{"), ("list", "[]"), ("old", '{"recipe": {}, "spec": {}, "seed": 0}')):
        (RUNS / name).mkdir(parents=True)
        (RUNS / name / "config.json").write_text(text)
    assert run_log.hints(config(), torch.device("cpu")) == []


# --- teachers --------------------------------------------------------------------------------------------------------


def made_for(spec: ModelSpec, **changes: Any) -> Path:
    path = Path("teacher.pt").absolute()
    torch.manual_seed(0)
    changed = replace(spec, **changes)
    save_model(path, build_model(changed), changed)
    return path


def state_dict(spec: ModelSpec) -> str:
    torch.save(build_model(spec).state_dict(), "weights.pt")
    return "weights.pt"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda spec: "nowhere.pt", ModelFileError, r"^rslad\.teacher: nowhere\.pt: no such file"),
        (state_dict, ModelFileError, r"^rslad\.teacher: .*weights\.pt: is a bare state dict"),
        (
            lambda spec: made_for(spec, classes=4, class_names=tuple("0123")),
            DataError,
            r"^rslad\.teacher: .*teacher\.pt was made for 4 classes, digits has 10",
        ),
        (
            lambda spec: made_for(spec, class_names=tuple("0124356789")),
            DataError,
            r"teacher\.pt calls class 3 '4', digits calls it '3'; give a teacher of the same",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line_and_nothing_is_written(
    digits_float: Path, make: Callable[[ModelSpec], str | Path], error: type[RobustqError], words: str
) -> None:
    _, spec, _ = load_model(digits_float)
    path = make(spec)
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(error, match=words) as raised:
        train("rslad", f"rslad.teacher={path}")
    assert "\n" not in str(raised.value)
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_recipe_without_a_teacher_says_how_to_name_one(digits_float: Path) -> None:
    with pytest.raises(UsageError, match=r"^recipe rslad needs a robust teacher; add --set rslad\.teacher=FILE"):
        train("rslad")
    with pytest.raises(UsageError, match=r"add --set rslad\.teacher=FILE"):
        robustq.harden_model(digits_float, recipe="rslad", overrides=KEYS, device="cpu")
    assert list(Path.cwd().iterdir()) == []
    odgq = load_recipe("odgq")
    assert with_absolute_teacher(odgq) is odgq


@pytest.mark.parametrize(
    ("key", "crops", "flip", "kind"),
    [
        ("augmented", 1, False, OnlineTeacher),
        ("augmented", 0, True, OnlineTeacher),
        ("augmented", 0, False, CachedTeacher),
        ("original", 1, True, CachedTeacher),
    ],
)
def test_answers_are_cached_where_that_is_exact_or_asked_for(
    digits_float: Path, key: str, crops: int, flip: bool, kind: type
) -> None:
    recipe = load_recipe("rslad", (f"rslad.teacher={digits_float}", f"rslad.teacher_sees={key}"))
    data = load_dataset("digits", train_images=20)
    teacher = open_teacher(recipe, data, augment=Augment(crops, flip), device=torch.device("cpu"))
    assert teacher is not None and type(teacher) is kind
    network = load_model(digits_float)[0].eval()
    (batch,) = data.train.batches(20, device="cpu")
    expected = network(batch.x).softmax(1)
    if kind is CachedTeacher and flip:
        expected = (expected + network(batch.x.flip(3)).softmax(1)) / 2
    # float32, through a logarithm and back.
    torch.testing.assert_close(teacher.logits(batch.x, batch.indices).softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_a_run_with_a_teacher_is_resumed_from_elsewhere(
    digits_float: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = ("rslad.teacher=teacher.pt", "rslad.teacher_sees=augmented", "warmup_epochs=0", "train_images=100")
    network, spec, info = load_model(digits_float)
    save_model(Path("teacher.pt"), network, replace(spec, epsilon=8 / 255), info=info)
    progress.show(True)
    try:
        alone = train("rslad", *taught, out=Path("alone"))
    finally:
        progress.show(False)
    assert f"teacher resnet8-float (epsilon 8/255), {tmp_path / 'teacher.pt'}" in capsys.readouterr().err
    config = json.loads(Path("alone/config.json").read_text())
    assert config["recipe"]["settings"]["teacher"] == str(tmp_path / "teacher.pt")
    rows = [json.loads(line) for line in Path("alone/metrics.jsonl").read_text().splitlines()]
    assert {"kl", "clean_kl", "holdout_pgd10_accuracy"} <= set(rows[0])
    assert rows[1]["kl"] < rows[0]["kl"]

    take_step = Training.take_step
    steps: list[int] = []

    def signalled(self: Training, batch: Batch) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3 - 1 + 2:  # two steps of the forecast: an epoch has no more; then the second of the run
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, batch)

    monkeypatch.setattr(Training, "take_step", signalled)
    with pytest.raises(RunStoppedError, match="stopped after batch 2 of 2 in epoch 1 of 2"):
        train("rslad", *taught, out=Path("stopped"))
    monkeypatch.setattr(Training, "take_step", take_step)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    Path("../teacher.pt").rename("../gone.pt")
    with pytest.raises(ModelFileError, match=rf"^rslad\.teacher: {tmp_path}/teacher\.pt: no such file"):
        robustq.resume_run("../stopped")
    other, _, _ = load_model(Path("../gone.pt"))
    with torch.no_grad():
        other.get_parameter("fc.bias").add_(1e-3)
    save_model(Path("../teacher.pt"), other, spec)
    with pytest.raises(ModelFileError, match="is not the teacher any more that the run began with; put that file back"):
        robustq.resume_run("../stopped")
    Path("../gone.pt").replace("../teacher.pt")
    again = robustq.resume_run("../stopped")
    assert again["best_epoch"] == alone["best_epoch"]
    one, two = (load_model(Path(f"../{name}/last.pt"))[0].state_dict() for name in ("alone", "stopped"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
