"""`robustq --help` answers without loading torch or anything else that is heavy.

What it costs in time is measured by `python -m benchmarks.cli_startup`; here only the cause is checked.
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


@pytest.mark.parametrize(
    ("arguments", "answer"), [(["--help"], "harden"), (["--version"], "0."), (["harden", "--help"], "--bits")]
)
def test_answers_without_loading_anything_heavy(tmp_path: Path, arguments: list[str], answer: str) -> None:
    loaded = tmp_path / "loaded.json"
    command = [sys.executable, "-c", PROGRAM, str(loaded), *arguments]
    # Typer colours its help wherever FORCE_COLOR or GITHUB_ACTIONS is set, between the letters of an option too.
    environment = {**os.environ, "_TYPER_FORCE_DISABLE_TERMINAL": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout
    modules = set(json.loads(loaded.read_text(encoding="utf-8")))
    assert "robustq.cli" in modules
    assert modules & HEAVY == set()
