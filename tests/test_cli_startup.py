"""`robustq --help` answers without loading torch or anything else that is heavy, and a training of one of our networks
without torch's compiler and sympy, which take longer than all the rest.

What it costs in time is measured by `python -m benchmarks.cli_startup` and `python -m benchmarks.first_step`; here only
the cause is checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"brevitas", "numpy", "onnx", "onnxruntime", "qonnx", "scipy", "sklearn", "torch", "torchvision"}

PROGRAM = """
import atexit, json, pathlib, sys
loaded = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: loaded.write_text(json.dumps(sorted(sys.modules))))
from robustq.cli import main
sys.exit(main())
"""


def loaded_by(arguments: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The finished program, and the modules that it had loaded at its end."""
    loaded = folder / "loaded.json"
    command = [sys.executable, "-c", PROGRAM, str(loaded), *arguments]
    # Typer colours its help wherever FORCE_COLOR or GITHUB_ACTIONS is set, between the letters of an option too.
    environment = {**os.environ, "_TYPER_FORCE_DISABLE_TERMINAL": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done, set(json.loads(loaded.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("arguments", "answer"), [(["--help"], "harden"), (["--version"], "0."), (["harden", "--help"], "--bits")]
)
def test_answers_without_loading_anything_heavy(tmp_path: Path, arguments: list[str], answer: str) -> None:
    done, modules = loaded_by(arguments, tmp_path)
    assert answer in done.stdout
    assert "robustq.cli" in modules
    assert modules & HEAVY == set()


def test_training_and_attacking_load_neither_the_compiler_nor_sympy(tmp_path: Path) -> None:
    tiny = ["--data", "digits", "--set", "epochs=1", "--set", "train_images=64", "--set", "monitor_images=16"]
    _, modules = loaded_by(["train", "--arch", "resnet8", "--bits", "4", *tiny, "--out", "run"], tmp_path)
    assert "brevitas" in modules
    assert modules & {"torch._dynamo", "sympy"} == set()
    _, modules = loaded_by(["attack", "run/best.pt", "--suite", "recheck", "--images", "4"], tmp_path)
    assert "brevitas" in modules
    assert modules & {"torch._dynamo", "sympy"} == set()
