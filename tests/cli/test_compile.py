"""--compile and --no-compile on the command line."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.hardening import optimization as descent
from robustq.hardening import precision as compiled
from robustq.hardening.precision import CompiledForward
from robustq.models.quant import integer_convolution
from tests.cli.conftest import Run

TRAIN = (
    *("train", "--data", "digits", "--arch", "resnet8", "--bits", "4", "--device", "cpu", "--out", "run"),
    *("--set", "epochs=1", "--set", "train_images=150", "--set", "batch_size=50", "--set", "monitor_images=50"),
)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(descent, "CompiledForward", functools.partial(CompiledForward, backend=backend))


def kept() -> tuple[bool, bool]:
    recipe = json.loads(Path("run/config.json").read_text())["recipe"]
    return recipe["compile"], recipe["cuda_graphs"]


def test_a_compiled_run_says_so_and_keeps_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    done = run(*TRAIN, "--compile")
    assert done.code == 0, done.err
    assert "batches of 50 · cpu · compiled\n" in done.err
    assert "note    the first step of each kind compiles" in done.err
    assert "with --compile" not in done.err
    assert kept() == (True, False)


def test_a_long_run_hears_of_it_and_a_short_one_does_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "note    so long a run may be a fifth shorter with --compile"
    assert told not in run(*TRAIN).err
    shutil.rmtree("run")
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0.0)
    assert told in run(*TRAIN).err
    shutil.rmtree("run")
    for kernel, bits, what in (
        (True, "4", "third"),
        (False, "4", "fifth"),
        (True, "1", "third"),
        (True, "32", "fifth"),
    ):
        monkeypatch.setattr(integer_convolution, "is_available", lambda kernel=kernel: kernel)
        assert f"a run may be a {what} shorter" in run(*TRAIN, "--recipe", "odgq", "--bits", bits).err
        shutil.rmtree("run")
    compile_with(monkeypatch, "eager")
    assert told not in run(*TRAIN, "--compile").err


def test_no_compile_outweighs_what_the_recipe_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, _refuse)
    done = run(*TRAIN, "--set", "compile=true", "--set", "cuda_graphs=true", "--no-compile")
    assert done.code == 0, done.err
    assert "compiled" not in done.err
    assert kept() == (False, False)


def test_a_compiler_that_fails_leaves_nothing_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, _refuse)
    done = run(*TRAIN, "--compile")
    assert done.code == 2
    assert done.err.strip().splitlines()[-1] == (
        "robustq: torch.compile does not work here (no compiler today); train without it: --no-compile"
    )
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's CPU code needs g++")
def test_without_a_compiler_on_the_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of it, in one line."""
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path("cache").absolute()))
    done = run(*TRAIN, "--compile")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("robustq: torch.compile does not work here (") and last.endswith("--no-compile")
    assert not Path("run").exists()


def _refuse(*_: Any) -> Any:
    raise RuntimeError("no compiler today")
