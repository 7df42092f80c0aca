"""Ctrl-C at any moment of a real process: one line and exit code 130, or the end that was near."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = "from robustq.cli import main; print('ready', flush=True); main()"
LATE = """
import os, time
class Late:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"late\\n")
        sleep(0.5)
late = Late()  # goes when Python clears its modules, after it has put the default action of signals back
"""
TINY = ("--set", "epochs=3", "--set", "train_images=200", "--set", "monitor_images=10", "--device", "cpu", "-q")


def stopped_after(delay: float, folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets SIGINT ``delay`` seconds after Python has started."""
    process = started(PROGRAM, folder, *words)
    wait_for(process, "ready\n")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    return process.returncode, told


def started(program: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None and line in iter(process.stdout.readline, "")


def check(code: int, told: str) -> None:
    assert code in (0, 130), told
    assert "Traceback" not in told
    if code == 130:
        last = told.splitlines()[-1]
        assert last.startswith("robustq: ") and "stopped" in last


@pytest.mark.parametrize("delay", [0.03, 0.08, 0.15, 0.25])
def test_while_the_program_is_loaded(tmp_path: Path, delay: float) -> None:
    check(*stopped_after(delay, tmp_path, "recipes"))


def test_while_python_ends(tmp_path: Path) -> None:
    process = started(LATE + PROGRAM, tmp_path, "recipes", "-q")
    wait_for(process, "late\n")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "")


@pytest.mark.slow
def test_at_ten_moments_spread_over_the_commands(tmp_path: Path, digits_w4a4: Path) -> None:
    rng = random.Random(0)
    model = str(digits_w4a4)
    commands = [
        ("train", "--data", "digits", "--arch", "resnet8", *TINY, "--out"),
        ("harden", model, "--bits", "4", *TINY, "--out"),
        ("export", model, "--images", "50", "--device", "cpu", "-q", "--out"),
        ("attack", model, "--suite", "recheck", "--images", "20", "--device", "cpu", "-q", "--out"),
        ("info", model),
    ]
    for number, words in enumerate(2 * commands):
        out = [str(tmp_path / f"out{number}")] if words[-1] == "--out" else []
        check(*stopped_after(rng.uniform(0.0, 5.0), tmp_path, *words, *out))
    # A run folder is whole or absent; an export folder and a result are written at once.
    assert [path for path in tmp_path.rglob(".*") if path.name.endswith(".partial")] == []
