"""Real processes that write the same names at once, or are killed while they write."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import BinaryIO

import pytest

from robustq.hardening import run_folder
from robustq.outputs import PARTIAL_FOLDER
from tests.cli.forked import Call, fork_server

FEW = ("--images", "10", "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


def meet_before_writing(barrier: Barrier) -> None:
    """Have this process wait for the other one before it writes its result."""
    from robustq import outputs
    from robustq.evaluation import adversarial_images

    write = outputs.write_new

    def wait_and_write(path: Path, content: Callable[[BinaryIO], object]) -> Path:
        barrier.wait(120)
        return write(path, content)

    for module in (outputs, adversarial_images):
        setattr(module, "write_new", wait_and_write)  # noqa: B010


@pytest.mark.slow
def test_two_attacks_write_one_name(tmp_path: Path, server: ForkServerContext, digits_w4a4: Path) -> None:
    """Both find it free at the start. One gets it, the other one the next name, and says so."""
    barrier = server.Barrier(2)
    words = ("attack", digits_w4a4, "--suite", "recheck", *FEW, "--out", "found.json")
    calls = [
        Call(server, tmp_path, *words, "--seed", str(seed), prepare=meet_before_writing, values=(barrier,))
        for seed in (1, 2)
    ]
    outcomes = [call.end() for call in calls]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    names = ["found-2.json", "found-2.npz", "found.json", "found.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    results = [json.loads((tmp_path / name).read_text()) for name in ("found.json", "found-2.json")]
    assert {result["seed"] for result in results} == {1, 2}
    assert {Path(result["adversarial"]).name for result in results} == {"found.npz", "found-2.npz"}
    assert sum("made by another process in the meantime" in outcome.err for outcome in outcomes) >= 1


def remember_often(run: str, barrier: Barrier) -> None:
    barrier.wait(120)
    for _ in range(100):
        run_folder.remember_hardened(Path(run))
    os._exit(0)


@pytest.mark.slow
def test_two_processes_write_last_hardened(tmp_path: Path, server: ForkServerContext) -> None:
    """A reader finds one of both runs whole, at any time."""
    barrier = server.Barrier(2)
    runs = [str(tmp_path / name) for name in ("short", "long" * 20)]
    calls = [Call(server, tmp_path, "info", prepare=remember_often, values=(run, barrier)) for run in runs]
    pointer, seen = tmp_path / run_folder.RUNS / run_folder.LAST_HARDENED, set()
    while any(call.process.is_alive() for call in calls):
        if pointer.exists():
            seen.add(pointer.read_text())
    assert [call.end().code for call in calls] == [0, 0]
    assert seen and seen <= {f"{run}\n" for run in runs}
    assert list(pointer.parent.iterdir()) == [pointer]


def stop_before_the_end(folder: Path) -> None:
    """Have the export of this process wait, with all its files but the record written."""
    from robustq.workflow import export

    def wait(*_: object) -> None:
        (folder / "ready").touch()
        time.sleep(300)

    setattr(export, "write_record", wait)  # noqa: B010


@pytest.mark.slow
def test_what_a_killed_export_left_is_removed_by_the_next(
    tmp_path: Path, server: ForkServerContext, digits_w4a4: Path
) -> None:
    words = ("export", digits_w4a4, "--no-recheck", "--max-drift", "1", *FEW)
    killed = Call(server, tmp_path, *words, prepare=stop_before_the_end, values=(tmp_path,))
    while not (tmp_path / "ready").exists():
        assert killed.process.is_alive()
        time.sleep(0.02)
    exports = tmp_path / "export-out"
    (left,) = exports.iterdir()
    names = {path.name for path in left.iterdir()}
    cards = {"card.md", "card.html", "card.cdx.json"}
    assert left.name.endswith(PARTIAL_FOLDER) and names == {"resnet8-w4a4.onnx", "model.pt", *cards}
    beside = Call(server, tmp_path, *words)  # while it lives, its folder stays
    assert beside.end().code == 0 and left.exists()
    os.kill(killed.process.pid or 0, signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    assert Call(server, tmp_path, *words).end().code == 0
    whole = [path.name for path in sorted(exports.iterdir())]
    name = f"{digits_w4a4.parent.name}-integer"
    assert whole == [name, f"{name}-2"]
