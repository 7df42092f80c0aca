"""Answers of the program that need no torch do not load it, and a training loads neither torch's compiler nor sympy.

`python -m benchmarks.cli_startup` and `python -m benchmarks.first_step` measure the time.
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
import json, sys
from robustq.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["robustq", *words]
    try:
        main()
    except SystemExit as stopped:
        codes.append(stopped.code)
print(json.dumps([codes, sorted(sys.modules)]))
"""

LIGHT = [
    (["--help"], 0),
    (["--version"], 0),
    (["harden", "--help"], 0),
    (["harden", "none.pt"], 2),
    (["attack", "none.pt"], 2),
    (["export", "none.pt"], 2),
    (["recheck", "none"], 2),
    (["info", "none.pt"], 2),
    (["harden", "text.pt", "--recipe", "none"], 2),
    (["train", "--recipe", "none.toml"], 2),
    (["attack", "text.pt", "--epsilon", "8/0"], 2),
]
"""Command lines and their exit codes."""


def calls(folder: Path, *lines: list[str]) -> tuple[list[int], set[str]]:
    """Exit codes, and the modules loaded in the end, of one fresh process."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=True)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    return codes, set(modules)


def test_help_and_missing_files_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("text")
    codes, modules = calls(tmp_path, *(words for words, _ in LIGHT))
    assert codes == [code for _, code in LIGHT]
    assert "robustq.cli" in modules and not modules & HEAVY


@pytest.mark.slow
def test_training_and_attacking_load_neither_the_compiler_nor_sympy(tmp_path: Path) -> None:
    tiny = ["--data", "digits", "--set", "epochs=1", "--set", "train_images=64", "--set", "monitor_images=16"]
    train = ["train", "--arch", "resnet8", "--bits", "4", *tiny, "--out", "run"]
    attack = ["attack", "run/best.pt", "--suite", "recheck", "--images", "4"]
    codes, modules = calls(tmp_path, train, attack)
    assert codes == [0, 0] and "brevitas" in modules
    assert not modules & {"torch._dynamo", "sympy"}
