"""The program: help, versions, --quiet and --verbose, colour and progress, completion, Ctrl-C, and errors."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from robustq.cli import names
from robustq.data import DATASET_NAMES
from robustq.errors import RobustqWarning
from robustq.evaluation.suites import SUITES
from robustq.export.formats import FORMATS
from robustq.models.spec import ARCHITECTURES
from robustq.recipe import recipe_names
from robustq.recipe.schema import KEYS
from tests.cli.conftest import FAST_TRAIN, Run

COMMANDS = ("quickstart", "train", "harden", "attack", "export", "recheck", "info", "recipes", "zoo")
MAIN = [sys.executable, "-c", "from robustq.cli import main; main()"]
FEW = ("--images", "5", "--epsilon", "0")
TRAIN = ("train", "--data", "digits", "--architecture", "resnet8", *FAST_TRAIN)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_names_the_common_options(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = run(command, "--help").out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for option in ("--json", "--out", "--seed", "--device", "--quiet", "--verbose"):
        assert option in text, option
    assert re.search(rf"^Examples:\n  robustq {command}", text, re.MULTILINE)
    assert re.search(rf"^  {command} ", run().out, re.MULTILINE)  # without a command: the help of all


def test_version_names_what_results_depend_on(run: Run) -> None:
    told = run("--version")
    assert told.code == 0 and "python 3." in told.out
    for name in ("robustq", "torch", "brevitas", "onnx", "onnxruntime", "qonnx"):
        assert f"{name} {version(name)}" in told.out


# --- what is printed -------------------------------------------------------------------------------------------------


def test_quiet_prints_the_result_alone_and_verbose_every_setting(run: Run, digits_float: Path) -> None:
    asked = ("attack", digits_float, *FEW)
    quiet = run(*asked, "--quiet")
    assert quiet.code == 0 and quiet.err == "" and "robust accuracy" in quiet.out
    assert "setting epsilon 0/255 (0.000000) · seed 0 · cpu" in run("--verbose", *asked).err
    told = run("harden", digits_float, "--bits", "8", "-v", *FAST_TRAIN)
    for line in ("epochs = 1", "[odgq]", 'update = "batch"', "momentum = 0.9", "seed 0"):
        assert f"setting {line}" in told.err


@pytest.mark.parametrize("words", [("-v", "attack", "none.pt"), ("attack", "none.pt", "-v")])
def test_verbose_keeps_the_traceback_of_bad_input(run: Run, words: tuple[str, ...]) -> None:
    lines = run(*words).err.strip().splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("robustq: none.pt: no such file")
    assert "Traceback" not in run("attack", "none.pt").err  # one call leaves nothing to the next


def test_quiet_and_verbose_exclude_each_other(run: Run) -> None:
    for arguments in (("-q", "-v", "recipes"), ("-q", "recipes", "-v"), ("recipes", "-v", "-q")):
        told = run(*arguments)
        assert told.code == 2 and "--quiet and --verbose exclude each other" in told.err


@pytest.mark.parametrize(("option", "theirs"), [("--json", False), ("--verbose", True)])
def test_warnings_of_libraries_are_shown_with_verbose_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, option: str, theirs: bool
) -> None:
    def warn() -> list[str]:
        warnings.warn("a library's", DeprecationWarning, stacklevel=1)
        warnings.warn("of\nours", RobustqWarning, stacklevel=1)
        return ["odgq"]

    monkeypatch.setattr("robustq.recipe.recipe_names", warn)
    before = warnings.showwarning
    told = run("recipes", option)
    assert "robustq: warning: of ours\n" in told.err and ("a library's" in told.err) == theirs
    assert warnings.showwarning is before


@pytest.mark.slow
def test_a_whole_job_shows_no_warning_of_a_library(tmp_path: Path, digits_w4a4: Path) -> None:
    """In a fresh process, where no warning was given before."""
    command = [*MAIN, "export", str(digits_w4a4), "--images", "5", "--no-recheck", "--format", "qonnx", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_piped_has_colour(tmp_path: Path) -> None:
    for arguments in (["harden", "--help"], ["harden", "none.pt"]):
        done = subprocess.run([*MAIN, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "\x1b" not in done.stdout + done.stderr


# --- completion ------------------------------------------------------------------------------------------------------

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


def test_completed_names_are_those_of_the_rooms() -> None:
    assert tuple(ARCHITECTURES) == tuple(names.ARCHITECTURES)
    assert {name: entry.summary for name, entry in FORMATS.items()} == names.FORMATS
    assert {name: entry.summary for name, entry in SUITES.items()} == names.SUITES
    assert tuple(names.DATA) == DATASET_NAMES
    assert names.complete_setting("") == [f"{key}=" for key in KEYS]
    assert names.complete_setting("epochs=") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_by_the_generated_script(tmp_path: Path) -> None:
    program = tmp_path / "robustq"
    program.write_text(f"#!{sys.executable}\nfrom robustq.cli import main\nmain()\n")
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
        "robustq harden --recipe mnist/": [name for name in recipe_names() if name.startswith("mnist/")],
        "robustq attack --suite ": list(SUITES),
        "robustq harden --data no-such-name": [],
        "robustq info --js": ["--json"],
    }
    answers = call("bash", "-c", PRESS_TAB, "bash", str(script), *asked).splitlines()
    assert [sorted(answer.split()) for answer in answers] == [sorted(names) for names in asked.values()]


# --- Ctrl-C and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stopped_at", "arguments"),
    [
        ("robustq.workflow.export.write_record", ("export", "MODEL", "--images", "5", "--no-recheck")),
        ("robustq.files.os.fsync", ("attack", "MODEL", *FEW, "--out", "found.json")),
        ("robustq.workflow.harden.quantize", ("harden", "MODEL", "--bits", "2", *FAST_TRAIN)),
    ],
)
def test_ctrl_c_leaves_nothing_half_written(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str, arguments: tuple[str, ...]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_at, stop)
    outcome = run(*(digits_w4a4 if word == "MODEL" else word for word in arguments))
    assert outcome.code == 130 and "Traceback" not in outcome.err
    assert outcome.err.strip().splitlines()[-1] == "robustq: stopped; nothing half-written is left behind"
    assert list(Path.cwd().rglob("*")) == []  # the folders that were made for it are gone, too


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_ctrl_c(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_imported(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("partially initialized module") from None

    monkeypatch.setattr("robustq.workflow.train.train_model", half_imported)
    stopped = run(*TRAIN)
    assert stopped.code == 130 and stopped.err.strip().splitlines()[-1].startswith("robustq: stopped")


def test_an_unexpected_error_keeps_its_traceback_and_has_an_exit_code_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("list index\nout of range")

    monkeypatch.setattr("robustq.recipe.recipe_names", fail)
    outcome = run("recipes")
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 70 and lines[0].startswith("Traceback")
    assert lines[-1].startswith("robustq: unexpected IndexError: list index out of range; please report it")


@pytest.mark.parametrize("command", ["train", "harden", "export", "attack", "quickstart"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments: dict[str, tuple[str | Path, ...]] = {
        "train": TRAIN[1:],
        "harden": (digits_w4a4, *FAST_TRAIN),
        "export": (digits_w4a4, "--images", "5", "--no-recheck"),
        "attack": (digits_w4a4, *FEW, "--out", "found.json"),
        "quickstart": (),
    }
    monkeypatch.setattr(os, "fsync", full)  # where a full disk shows at the latest, for every file that we write
    outcome = run(command, *arguments[command])
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("robustq: ") and "No space left on device; free space or name another place" in last
    assert list(Path.cwd().rglob("*")) == []  # the folders that were made for it are gone, too


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen([*MAIN, "recipes"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- the process, in one of its own, where changes do not last -------------------------------------------------------

FAULTS = """
import resource, torch
from robustq.cli.process import keep_freed_memory
kept = keep_freed_memory()
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(4 * 1024 * 1024, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(10)
print(kept, rounds(10))
"""


def answer(code: str, **environment: str) -> list[str]:
    base = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=base
    ).stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = answer(FAULTS)
    disabled, usual = answer(FAULTS, MALLOC_TRIM_THRESHOLD_="0")
    assert (kept, disabled) == ("True", "False")
    # 10 blocks of 4 MB are 10,240 pages; trimmed at each turn, all of them are taken anew.
    assert int(faults) < 1000 < 8_000 < int(usual)
