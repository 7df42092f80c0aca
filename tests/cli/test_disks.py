"""Real processes on full disks and in folders that cannot be written: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.cli.forked import Call, fork_server, full_disk

TINY = ("--set", "epochs=1", "--set", "train_images=100", "--set", "monitor_images=10")
FEW = ("--images", "5", "--device", "cpu", "-q")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--data", "digits", "--architecture", "resnet8", *TINY, "--device", "cpu", "-q"),
    "harden": ("harden", "w4a4.pt", "--bits", "4", *TINY, "--device", "cpu", "-q"),
    "export": ("export", "w4a4.pt", "--no-recheck", *FEW),
    "quickstart": ("quickstart", "--device", "cpu", "-q"),
    "attack": ("attack", "w4a4.pt", "--suite", "recheck", *FEW, "--out", "found.json"),
    "recheck": ("recheck", "bundle", *FEW, "--out", "found.json"),
    "info": ("info", "w4a4.pt", "--out", "found.json"),
    "recipes": ("recipes", "odgq", "--out", "found.json"),
}
PRINTING = ("attack", "info", "recipes")
"""Commands that print the result that they cannot write."""

READ_ONLY = Path("/sys")
"""Not even root can make a file here."""


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture
def folder(tmp_path: Path, digits_w4a4: Path, bundle: Path) -> Path:
    shutil.copy(digits_w4a4, tmp_path / "w4a4.pt")
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path


def check(outcome: Outcome, reason: str, *, prints: bool) -> None:
    assert outcome.code == 2, outcome.err
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("robustq: ") and reason in line and "Traceback" not in outcome.err
    assert bool(outcome.out) == prints


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(folder: Path, server: ForkServerContext, command: str) -> None:
    """No file may grow beyond 1000 bytes."""
    before = set(folder.rglob("*"))
    outcome = Call(server, folder, *COMMANDS[command], prepare=full_disk, values=(1000,)).end()
    # recheck has onnxruntime write its optimised graph before there is a result.
    check(outcome, "cannot be written" if command == "recheck" else "File too large", prints=command in PRINTING)
    assert set(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written(folder: Path, server: ForkServerContext, command: str) -> None:
    words = [str(folder / word) if word in ("w4a4.pt", "bundle") else word for word in COMMANDS[command]]
    outcome = Call(server, READ_ONLY, *words).end()
    check(outcome, "cannot be written below /sys", prints=False)


def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    program = "from robustq.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "recipes", "odgq"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("robustq: stdout: No space left on device")
