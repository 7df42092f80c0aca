"""Real processes with too little address space: one line that names what fits, exit code 2, nothing left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robustq
from robustq.checkpoint import save_model
from robustq.models.spec import ModelSpec, build_model
from tests.cli.conftest import check_refused
from tests.cli.forked import Call, fork_server, little_memory

LITTLE = 250
"""MB on top of the loaded program. 256 images need about twice as much."""

ONE_EPOCH = ("--set", "epochs=1", "--set", "train_images=0", "--set", "monitor_images=10", "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained network for images of 32 pixels, model.pt, and its export folder."""
    folder = tmp_path_factory.mktemp("large")
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (256, 32, 32, 3), np.uint8), np.arange(256) % 10
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    spec = ModelSpec("resnet8", 32, 32, 10, 3, 32, str(folder / "data.npz"), 8 / 255, ())
    torch.manual_seed(0)
    save_model(folder / "model.pt", build_model(spec), spec)
    robustq.export_model(
        folder / "model.pt", format_name="float", images=20, recheck=False, device="cpu", out=folder / "bundle"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("train", "--data", "data.npz", "--architecture", "resnet8"), ("harden", "model.pt", "--bits", "4")]
)
def test_a_batch_that_fits_is_named_and_fits(
    tmp_path: Path, server: ForkServerContext, large: Path, words: tuple[str, ...]
) -> None:
    typed = [str(large / word) if (large / word).exists() else word for word in words]

    def call(batch_size: int) -> Call:
        sized = (*typed, *ONE_EPOCH, "--set", f"batch_size={batch_size}", "--out", "run")
        return Call(server, tmp_path, *sized, prepare=little_memory, values=(LITTLE,))

    refused = call(200).end()
    check_refused(refused, "out of memory on cpu with batches of 200 images; a batch of ")
    assert list(tmp_path.iterdir()) == []
    (fitting,) = re.findall(r"--set batch_size=(\d+)$", refused.err.strip())
    assert call(int(fitting)).end().code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("attack", "model.pt", "--suite", "recheck"), ("export", "model.pt", "--format", "float"), ("recheck", "bundle")],
)
def test_a_number_of_images_that_fits_is_named(
    tmp_path: Path, server: ForkServerContext, large: Path, words: tuple[str, ...]
) -> None:
    command, model, *options = words
    more = (*options, "--images", "256", "--device", "cpu", "-q")
    refused = Call(server, tmp_path, command, large / model, *more, prepare=little_memory, values=(LITTLE,)).end()
    check_refused(refused, "out of memory on cpu with 256 images; a batch of ")
    assert list(tmp_path.iterdir()) == []


def limited(folder: Path, megabytes: int, *words: str, **options: Any) -> subprocess.Popen[str]:
    """The program, whose address space is limited before it loads torch."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2); "
        "from robustq.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("megabytes", [30, 500, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_program_that_cannot_be_loaded(tmp_path: Path, megabytes: int) -> None:
    """While Python loads the command line, and while the command loads torch and its threads."""
    done = limited(tmp_path, megabytes, "train", "--data", "digits", "--architecture", "resnet8")
    out, err = done.communicate()
    assert (done.returncode, out) == (2, "")
    assert err.startswith("robustq: out of memory") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 2, "out of memory (SIGSEGV in native code); allow"),
        ("os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", 130, "stopped"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
    ],
)
def test_the_watching_process_ends_as_the_command_does(tmp_path: Path, body: str, code: int, line: str) -> None:
    """The signals reach the first process, as from a terminal or a scheduler."""
    (tmp_path / "own.py").write_text(f"import os, signal, time\n\n\ndef build(num_classes):\n    {body}\n")
    words = ("train", "--data", "digits", "--model", "own:build")
    done = limited(tmp_path, 64 << 10, *words, preexec_fn=allow_interrupts)
    _, err = done.communicate()
    assert done.returncode == code, err
    assert line in err and len(err.splitlines()) == bool(line)


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_loaded(tmp_path: Path) -> None:
    done = limited(tmp_path, 64 << 10, "train", "--data", "digits", "--arch", "resnet8", preexec_fn=allow_interrupts)
    children = Path(f"/proc/{done.pid}/task/{done.pid}/children")
    while not children.read_text():
        assert done.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    done.send_signal(signal.SIGINT)
    _, err = done.communicate()
    assert (done.returncode, len(err.splitlines())) == (130, 1) and "stopped" in err


def allow_interrupts() -> None:
    """A process that a shell started with & ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
