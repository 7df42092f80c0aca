"""The shell's completion: the script that robustq generates, run by bash itself, and the names it offers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robustq.cli import options as completion
from robustq.data import DATASET_NAMES
from robustq.evaluation.suites import SUITES
from robustq.export.formats import CONSUMERS, FORMATS
from robustq.models.spec import ARCHITECTURES
from robustq.recipe import recipe_names
from robustq.recipe.schema import KEYS

PROGRAM = "#!{python}\nfrom robustq.cli import main\nmain()\n"

# What bash does when Tab is pressed: sets COMP_WORDS and COMP_CWORD, calls the function, reads COMPREPLY.
PRESS_TAB = """
source "$1"
for line in "${@:2}"; do
    COMP_WORDS=($line)
    case "$line" in *" ") COMP_WORDS+=("");; esac
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    COMPREPLY=()
    _robustq_completion robustq
    echo "${COMPREPLY[@]}"
done
"""


def test_the_names_are_those_of_the_rooms() -> None:
    assert tuple(ARCHITECTURES) == completion.ARCHITECTURES
    assert tuple(FORMATS) == completion.FORMATS
    assert CONSUMERS == completion.CONSUMERS
    assert tuple(SUITES) == completion.SUITES
    assert completion.DATA == DATASET_NAMES
    assert completion.complete_recipe("") == recipe_names()
    assert completion.complete_recipe("cifar10/") == [name for name in recipe_names() if name.startswith("cifar10/")]
    assert completion.complete_setting("epo") == ["epochs="]
    assert completion.complete_setting("") == [f"{key}=" for key in KEYS]
    assert completion.complete_setting("epochs=") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_by_the_generated_script(tmp_path: Path) -> None:
    program = tmp_path / "robustq"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def call(*command: str, **more: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout

    # What --show-completion prints; that option asks the process tree which shell it is, and a test has none.
    script = tmp_path / "complete.sh"
    script.write_text(call("robustq", _ROBUSTQ_COMPLETE="source_bash"))
    asked = {
        "robustq ha": ["harden"],
        "robustq export --format q": ["qonnx", "qcdq"],
        "robustq train --architecture resnet2": ["resnet20", "resnet20-a"],
        "robustq harden --recipe mnist/": [name for name in recipe_names() if name.startswith("mnist/")],
        "robustq attack --suite ": list(SUITES),
        "robustq recipes od": ["odgq"],
        "robustq harden --data no-such-name": [],
        "robustq info --js": ["--json"],
    }
    answers = call("bash", "-c", PRESS_TAB, "bash", str(script), *asked).splitlines()
    assert [sorted(answer.split()) for answer in answers] == [sorted(names) for names in asked.values()]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_too(tmp_path: Path, shell: str) -> None:
    command = [sys.executable, "-c", "from robustq.cli import main; main()"]
    environment = {**os.environ, "_ROBUSTQ_COMPLETE": f"source_{shell}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert f"_ROBUSTQ_COMPLETE=complete_{shell}" in done.stdout and "robustq" in done.stdout
