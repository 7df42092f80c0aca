"""Real processes with too little address space: one line that names what fits, exit code 2, nothing left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

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


@pytest.mark.parametrize("megabytes", [30, 500])
def test_a_program_that_cannot_be_loaded(tmp_path: Path, megabytes: int) -> None:
    """While Python loads the command line, and while the command loads torch."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2); "
        "from robustq.cli import main; main()"
    )
    words = ("train", "--data", "digits", "--architecture", "resnet8")
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("robustq: out of memory (") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
