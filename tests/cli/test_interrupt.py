"""Ctrl-C at any moment of a real process: one line and exit code 130, or the end that was near."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = "import sys; print('ready', flush=True); from robustq.cli import main; main()"
TINY = ("--set", "epochs=3", "--set", "train_images=200", "--set", "monitor_images=10", "--device", "cpu", "-q")


def stopped_after(delay: float, folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets SIGINT ``delay`` seconds after Python has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    return process.returncode, told


def check(code: int, told: str) -> None:
    assert code in (0, 130), told
    assert "Traceback" not in told
    if code == 130:
        last = told.splitlines()[-1]
        assert last.startswith("robustq: ") and "stopped" in last


@pytest.mark.parametrize("delay", [0.03, 0.08, 0.15, 0.25])
def test_while_the_program_is_loaded(tmp_path: Path, delay: float) -> None:
    check(*stopped_after(delay, tmp_path, "recipes"))


@pytest.mark.slow
def test_at_some_moments_of_each_command(tmp_path: Path, digits_w4a4: Path) -> None:
    rng = random.Random(0)
    model = str(digits_w4a4)
    commands = [
        ("train", "--data", "digits", "--arch", "resnet8", *TINY, "--out"),
        ("harden", model, "--bits", "4", *TINY, "--out"),
        ("export", model, "--images", "50", "--device", "cpu", "-q", "--out"),
        ("attack", model, "--suite", "recheck", "--images", "20", "--device", "cpu", "-q", "--out"),
        ("info", model),
    ]
    for number, words in enumerate(commands):
        for trial in range(4):
            out = [str(tmp_path / f"out{number}-{trial}")] if words[-1] == "--out" else []
            check(*stopped_after(rng.uniform(0.0, 6.0), tmp_path, *words, *out))
    # A run folder is whole or absent; an export folder and a result are written at once.
    assert [path for path in tmp_path.rglob(".*") if path.name.endswith(".partial")] == []
