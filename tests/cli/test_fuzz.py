"""1,050 calls with random command lines and files that are damaged or built to harm, all drawn from one seed a case.

Whatever comes in: no traceback, exit 0, 1 or 2 within 20 seconds and 2 GB, and after a refusal one last line that
begins with "robustq: ", nothing on stdout and nothing written. No line holds a terminal's code.
"""

from __future__ import annotations

import faulthandler
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file

import robustq
from robustq.checkpoint import load_model
from tests.cli import fuzz_inputs
from tests.cli.conftest import Outcome, Run

CASES = {
    "command line": 200,
    "model file": 150,
    "safetensors": 50,
    "npz": 120,
    "replay": 100,
    "toml": 80,
    "folder": 50,
    "onnx": 100,
    "json": 100,
    "own file": 100,
}
PARTS = 5
SECONDS, MEGABYTES = 20, 2000

MAKERS: dict[str, Callable[[random.Random, Path], list[str]]] = {
    "command line": fuzz_inputs.command_line,
    "model file": fuzz_inputs.model_file,
    "safetensors": fuzz_inputs.safetensors,
    "npz": fuzz_inputs.npz,
    "replay": fuzz_inputs.replay,
    "toml": fuzz_inputs.toml,
    "folder": fuzz_inputs.image_folder,
    "onnx": fuzz_inputs.graph,
    "json": fuzz_inputs.table,
    "own file": fuzz_inputs.own_file,
}


class Late(BaseException):
    """No Exception, which the command line would catch."""


@contextmanager
def limits() -> Iterator[None]:
    """Within the block: 20 seconds, and 2 GB more memory than before it."""

    def late(*_: object) -> None:
        raise Late(f"over {SECONDS} seconds")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = memory("VmRSS")
    # In compiled code the alarm is not heard. capsys has replaced sys.stderr.
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.alarm(SECONDS)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    assert memory("VmHWM") - start < MEGABYTES


def memory(name: str) -> int:
    """MB of this process, by Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) // 1024


def check(outcome: Outcome, before: set[Path]) -> None:
    assert (outcome.out + outcome.err).replace("\n", "").isprintable()
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code in (0, 1, 2), outcome.err
    if outcome.code:
        lines = outcome.err.strip().splitlines()
        assert lines[-1].startswith("robustq: "), outcome.err
    if outcome.code == 2:
        assert outcome.out == ""
        assert set(Path.cwd().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_comes_in(
    run: Run,
    digits_float: Path,
    digits_w4a4: Path,
    bundle: Path,
    float_bundle: Path,
    adversarial: Path,
    what: str,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A word of the command line may be "~": what it finds there must not depend on whose machine this is.
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("ROBUSTQ_DATA", str(Path.cwd() / "no-data"))
    shutil.copy(digits_float, "float.pt")
    shutil.copy(digits_w4a4, "w4a4.pt")
    shutil.copy(adversarial, "own.npz")
    shutil.copytree(bundle, "bundle")
    shutil.copytree(float_bundle, "float-bundle")
    robustq.export_weights(digits_float, out="own.safetensors")
    save_file(load_model(digits_float)[0].state_dict(), "foreign.safetensors")
    Path("text.pt").write_text("text")
    Path("folder").mkdir()
    exits: dict[int, int] = {}
    for case in range(CASES[what] // PARTS):
        draw = random.Random(f"{what} {part} {case}")
        for made in (*Path.cwd().glob("fuzzed*"), Path("images")):
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        words = MAKERS[what](draw, Path.cwd())
        before = set(Path.cwd().rglob("*"))
        try:
            with limits():
                outcome = run(*words)
            check(outcome, before)
        except BaseException:
            print(f"case {case}: {words!r}"[:2000])
            raise
        exits[outcome.code] = exits.get(outcome.code, 0) + 1
    assert exits[2] > CASES[what] // PARTS * 0.3, exits  # else this would test little
    assert what != "command line" or exits[0] >= 2, exits
    assert what != "own file" or exits == {2: CASES[what] // PARTS}, exits
