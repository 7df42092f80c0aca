"""The commands that robustq prints for the next step can be run as printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustq.cli.next_step import after_attack, after_export, after_recheck, after_training, replay_of
from robustq.cli.options import Judging
from tests.cli.conftest import Run
from tests.data.images import write_images

CODE = """
from torch import nn

def build(num_classes):
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""

OPTIONS = Judging(custom_model="own nets:build", data="new data", skip_bad_images=True, epsilon="4/255")
AGAIN = ["--model", "own nets:build", "--data", "new data", "--epsilon", "4/255", "--skip-bad-images"]


def exported(**changed: Any) -> dict[str, Any]:
    bundle = str(Path.cwd() / "export out" / "x")
    return {"bundle": bundle, "format": "integer", "equal_in": ["onnxruntime"], "recheck": {}, **changed}


def words(command: str | None) -> list[str]:
    assert command is not None
    return shlex.split(command)


def test_export_is_followed_by_what_was_not_done() -> None:
    folder = "export out/x"
    assert words(after_export(exported(), OPTIONS)) == ["robustq", "attack", folder, *AGAIN]
    assert words(after_export(exported(recheck=None), OPTIONS)) == ["robustq", "recheck", folder, *AGAIN]
    other = words(after_export(exported(format="qonnx"), Judging()))
    assert other == ["robustq", "export", f"{folder}/model.pt", "--format", "integer"]
    assert after_export(exported(equal_in=[]), OPTIONS) is None
    checked = exported(shortfalls=[], file_failures=[])
    assert words(after_recheck(checked, Judging())) == ["robustq", "attack", folder]
    assert after_recheck({**checked, "shortfalls": ["parity"]}, Judging()) is None


def test_training_and_attacks() -> None:
    run = {"checkpoint": "/elsewhere/it's/best.pt", "model": "resnet8-float"}
    assert words(after_training(run, custom_model=None, data=None)) == [
        *("robustq", "harden", "/elsewhere/it's/best.pt", "--bits", "4")
    ]
    hardened = {**run, "model": "resnet8-w4a4", "bits": 4}
    assert words(after_training(hardened, custom_model="a:b", data=None)) == [
        *("robustq", "export", "/elsewhere/it's/best.pt", "--format", "integer", "--model", "a:b")
    ]
    attacked = {"model": "/elsewhere/best.pt", "judge": "pytorch", "label": "resnet8-w4a4", "adversarial": "/f o.npz"}
    assert words(after_attack(attacked, Judging())) == [
        *("robustq", "export", "/elsewhere/best.pt", "--format", "integer")
    ]
    form = {"--input": "unit", "--layout": None}
    assert words(replay_of(attacked, Judging(data="new data"), form=form)) == [
        *("robustq", "attack", "/elsewhere/best.pt", "--replay", "/f o.npz", "--input", "unit", "--data", "new data")
    ]
    assert after_attack({**attacked, "judge": "onnxruntime"}, Judging()) is None


def test_saved_images_replay_as_printed(run: Run, digits_w4a4: Path) -> None:
    few = ("--suite", "recheck", "--images", "6", "--device", "cpu")
    told = run("attack", digits_w4a4, *few, "--save-adversarial", "my images.npz")
    (again,) = [line.removeprefix("again   robustq ") for line in told.out.splitlines() if line.startswith("again")]
    assert run(*shlex.split(again)).code == 0


@pytest.mark.slow
def test_a_custom_network_by_the_printed_commands_alone(tmp_path: Path) -> None:
    """From float to an attacked file, each step a process of a shell."""
    here = tmp_path / "my networks"
    here.mkdir()
    (here / "own_nets.py").write_text(CODE, encoding="utf-8")
    write_images(here / "my images", {"a": 30, "b": 30}, size=(12, 8))
    (here / "my images" / "b" / "05.png").write_bytes(b"no image")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = (
        "robustq train --model own_nets:build --data 'my images' --skip-bad-images --resize squash --device cpu "
        "--set epochs=1 --set image_size=8 --set batch_size=16"
    )
    done = []
    while command:
        step = subprocess.run(
            command, shell=True, cwd=here, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert step.returncode in (0, 1), f"{command}: {step.stderr}"  # 1: folding changed many of so few answers
        done.append(command.split()[1])
        following = [line.removeprefix("next    ") for line in step.stdout.splitlines() if line.startswith("next ")]
        assert len(following) <= 1
        command = following[0] if following else ""
    assert done == ["train", "harden", "export", "attack"]
