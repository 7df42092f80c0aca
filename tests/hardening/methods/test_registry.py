"""One file makes a method: a planted one is trained by the command line, and its name is suggested and checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLANTED = """
from dataclasses import dataclass

from robustq.hardening.methods.method import AdversarialTraining
from robustq.hardening.methods.settings import MethodSettings, number


@dataclass(frozen=True, kw_only=True)
class PlantedSettings(MethodSettings):
    method = "planted"

    shift: float = number(0.5, low=0, high=1)


class Planted(AdversarialTraining):
    def perturb(self, x, y, indices):
        return (x + self.settings.shift * self.epsilon).clamp(0, 1)
"""

RECIPE = """
method = "planted"
epochs = 1
batch_size = 32
lr = 0.1
train_images = 64
monitor_images = 16

[planted]
shift = 0.25
"""

PROGRAM = """
import sys
import robustq.hardening.methods
robustq.hardening.methods.__path__.append(".")
from robustq.cli import main
main()
"""


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "train", "--recipe", "own.toml", "--data", "digits", "--arch", "resnet8"]
    return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_method_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "own.toml").write_text(RECIPE)
    done = train(tmp_path, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "own.toml: planted (epsilon 8/255)" in done.stderr and (tmp_path / "run" / "best.pt").is_file()
    for setting, told in (
        ("method=plantd", "method = 'plantd' is unknown; known: "),
        ("method=plantd", "(nearest: planted)"),
        ("planted.shift=2", "planted.shift = 2 must be a number from 0 to 1"),
        ("shfit=1", "unknown key 'shfit' (nearest: planted.shift)"),
    ):
        refused = train(tmp_path, "--set", setting)
        assert refused.returncode == 2 and told in refused.stderr
