"""A robust teacher from outside: refused in one line before anything is written, written down, asked for again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robustq
from robustq import progress
from robustq.checkpoint import load_model, save_model
from robustq.data import Augment, Batch, load_dataset
from robustq.errors import DataError, ModelFileError, RobustqError, RunStoppedError, UsageError
from robustq.hardening.methods.rslad import AskedTeacher, CachedTeacher
from robustq.hardening.trainer import Training
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe
from robustq.workflow.training_run import open_teacher, with_absolute_teacher

KEYS = ("epochs=2", "train_images=100", "batch_size=64", "monitor_images=10", "warmup_epochs=0")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*settings: str, **keys: Any) -> Any:
    """A float student of the digits, from scratch."""
    return robustq.train_model(
        "rslad", overrides=(*KEYS, *settings), data="digits", architecture="resnet8", device="cpu", **keys
    )


def made_for(spec: ModelSpec, **changes: Any) -> Path:
    path = Path("teacher.pt").absolute()
    torch.manual_seed(0)
    changed = replace(spec, **changes)
    save_model(path, build_model(changed), changed)
    return path


def missing(_: ModelSpec) -> str:
    return "nowhere.pt"


def folder(_: ModelSpec) -> str:
    Path("folder").mkdir()
    return "folder"


def state_dict(spec: ModelSpec) -> str:
    torch.save(build_model(spec).state_dict(), "weights.pt")
    return "weights.pt"


def four_classes(spec: ModelSpec) -> Path:
    return made_for(spec, classes=4, class_names=tuple("0123"))


def sixteen_pixels(spec: ModelSpec) -> Path:
    return made_for(spec, image_size=16)


def colour(spec: ModelSpec) -> Path:
    return made_for(spec, channels=3)


def other_order(spec: ModelSpec) -> Path:
    return made_for(spec, class_names=tuple("0124356789"))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (missing, ModelFileError, r"^rslad\.teacher: nowhere\.pt: no such file"),
        (folder, ModelFileError, r"^rslad\.teacher: folder: is a folder; give the \.pt file in it"),
        (state_dict, ModelFileError, r"^rslad\.teacher: .*weights\.pt: is a bare state dict"),
        (four_classes, DataError, r"^rslad\.teacher: .*teacher\.pt was made for 4 classes, digits has 10"),
        (sixteen_pixels, DataError, r"teacher\.pt was made for 16 pixels a side, digits has 8"),
        (colour, DataError, r"teacher\.pt was made for 3 channels, digits has 1"),
        (other_order, DataError, r"teacher\.pt calls class 3 '4', digits calls it '3'; give a teacher of the same"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line_and_nothing_is_written(
    digits_float: Path, make: Callable[[ModelSpec], str | Path], error: type[RobustqError], words: str
) -> None:
    _, spec, _ = load_model(digits_float)
    path = make(spec)
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(error, match=words) as raised:
        train(f"rslad.teacher={path}")
    assert "\n" not in str(raised.value)
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_recipe_without_a_teacher_says_how_to_name_one(digits_float: Path) -> None:
    with pytest.raises(UsageError, match=r"^recipe rslad .* names none; add --set rslad\.teacher=FILE"):
        train()
    with pytest.raises(UsageError, match=r"add --set rslad\.teacher=FILE"):
        robustq.harden_model(digits_float, recipe="rslad", overrides=KEYS, device="cpu")
    assert list(Path.cwd().iterdir()) == []
    odgq = load_recipe("odgq")
    assert with_absolute_teacher(odgq) is odgq


@pytest.mark.parametrize(
    ("key", "crops", "flip", "kind"),
    [
        ("augmented", 1, False, AskedTeacher),
        ("augmented", 0, True, AskedTeacher),
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
    torch.testing.assert_close(teacher.logits(batch.x, batch.places).softmax(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sees", ["augmented", "original"])
def test_a_run_with_a_teacher_is_resumed_from_elsewhere(
    digits_float: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], sees: str
) -> None:
    taught = ("rslad.teacher=teacher.pt", f"rslad.teacher_sees={sees}")
    network, spec, info = load_model(digits_float)
    save_model(Path("teacher.pt"), network, replace(spec, epsilon=8 / 255), info=info)
    progress.show(True)
    try:
        alone = train(*taught, out=Path("alone"))
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
        train(*taught, out=Path("stopped"))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "terms"),
    [
        ("pgd", {"cross_entropy"}),
        ("free", {"cross_entropy"}),
        ("dq", {"cross_entropy", "orthogonality"}),
        ("fgsm-rs", {"cross_entropy"}),
        ("n-fgsm", {"cross_entropy"}),
        ("fgsm-mep", {"cross_entropy", "mse"}),
        ("trades", {"cross_entropy", "kl"}),
        ("rslad", {"kl", "clean_kl"}),
    ],
)
def test_harden_by_every_method(digits_float: Path, recipe: str, terms: set[str]) -> None:
    settings = [f"rslad.teacher={digits_float}"] if recipe == "rslad" else []
    result = robustq.harden_model(
        digits_float, bits=4, recipe=recipe, overrides=(*KEYS, "lr=0.005", *settings), device="cpu", out=Path("run")
    )
    assert (result["method"], result["bits"], result["epochs"]) == (recipe, 4, 2)
    # A network that knew the digits when it came, and four small steps did not break: guessing gives a tenth.
    assert result["clean_accuracy"] > 0.5
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert terms <= set(rows[0])
    assert (rows[0]["holdout_pgd10_accuracy"] is None) == (recipe == "dq")
    assert Path("runs/last-hardened").exists()
