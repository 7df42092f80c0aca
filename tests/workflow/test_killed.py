"""A real process is killed again and again, wherever it happens to be, and resumed until its end: the same bits.

Each kill is a SIGKILL of the whole process. Where it falls is drawn from a seed, not left to how busy the machine is:
so many milliseconds after the start or after a step, at a byte of a file, or just before or after a file is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from robustq.checkpoint import load_model
from robustq.files import PARTIAL
from robustq.hardening.metrics import MACHINE_KEYS

EPOCHS = 24  # more than all kills together let pass
KEYS = (f"epochs={EPOCHS}", "train_images=100", "batch_size=64", "monitor_images=4")
RUN = Path("run")
PATIENCE = 300.0
"""Seconds until a process that should have ended long ago is given up."""


@dataclass(frozen=True)
class Doom:
    """Where a process dies: at its `number`-th event of a kind, or `delay` seconds after it (but two steps at most)."""

    kind: str
    number: int = 1
    delay: float = 0.0


def die(delay: float = 0.0) -> NoReturn:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("outlived SIGKILL")


def prepare(doom: Doom) -> None:
    """Have this process die as `doom` says."""
    from robustq import checkpoint
    from robustq.hardening.trainer import Training

    events = 0

    def due() -> bool:
        nonlocal events
        events += 1
        return events == doom.number

    if doom.kind in ("start", "step"):
        take_step = Training.take_step
        if doom.kind == "start":
            threading.Thread(target=die, args=(doom.delay,), daemon=True).start()

        def step(self: Training, batch: Any) -> torch.Tensor:
            if due() and doom.kind == "step":
                threading.Thread(target=die, args=(doom.delay,), daemon=True).start()
            # A delay is in seconds, which are worth more steps on a quick machine: no further than this on any.
            if events >= doom.number + (2 if doom.kind == "step" else 0):
                die()
            return take_step(self, batch)

        Training.take_step = step  # type: ignore[method-assign]
    elif doom.kind == "byte":
        write = checkpoint._Sink.write

        def half(self: checkpoint._Sink, data: bytes) -> int:
            if due():
                write(self, bytes(data)[: len(data) // 2])
                self._file.flush()
                die()
            return write(self, data)

        checkpoint._Sink.write = half  # type: ignore[method-assign]
    else:
        fsync = os.fsync

        def sync(handle: int) -> None:
            now = due()
            if now and doom.kind == "before sync":
                die()
            fsync(handle)
            if now:
                die()

        os.fsync = sync  # type: ignore[assignment]


def command_line(arguments: list[str], folder: str, doom: Doom | None, file_size: int | None) -> None:
    """``robustq`` as it is typed, in this process."""
    os.chdir(folder)
    # Open as long as the process lives.
    sys.stderr = open("stderr.txt", "a", buffering=1)  # noqa: SIM115
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if doom is not None:
        prepare(doom)
    from robustq.cli import main

    sys.argv = ["robustq", *arguments]
    main()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Forks processes that have torch and Brevitas loaded already: that many starts would else take minutes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["robustq.workflow.resume", "robustq.workflow.train", "torch._dynamo"])
    yield context


class Life:
    """A process that begins the run, or resumes it where its folder is there."""

    def __init__(
        self,
        server: ForkServerContext,
        folder: Path,
        source: Path,
        doom: Doom | None = None,
        *,
        file_size: int | None = None,
    ) -> None:
        begin = ["harden", str(source), "--bits", "4", "--device", "cpu", "--out", str(RUN)]
        for key in KEYS:
            begin += ["--set", key]
        arguments = ["harden", "--resume", str(RUN)] if (folder / RUN).exists() else begin
        self.process: BaseProcess = server.Process(target=command_line, args=(arguments, str(folder), doom, file_size))
        self.process.start()

    def end(self) -> int | None:
        self.process.join(PATIENCE)
        assert not self.process.is_alive()
        return self.process.exitcode


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(PARTIAL)]


def epochs(folder: Path) -> int:
    state = torch.load(folder / RUN / "resume.pt", weights_only=True)["state"]
    return int(state["standing"]["epoch"])


def outcome(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in MACHINE_KEYS:
            del row[key]
    result = json.loads((run / "result.json").read_text())
    for key in ("checkpoint", "run", "seconds_per_epoch"):
        del result[key]
    states = {name: load_model(run / name)[0].state_dict() for name in ("best.pt", "last.pt")}
    return {"rows": rows, "result": result, **states}


def dooms(seconds_to_start: float) -> list[Doom]:
    """Two dozen, in a fixed order: a third at the start, a third between the files, a third in them."""
    rng = random.Random(0)
    drawn = [
        *(Doom("start", delay=rng.uniform(0, seconds_to_start)) for _ in range(6)),
        # A resumed process takes up to two steps for its forecast, then two an epoch.
        *(Doom("step", rng.randint(1, 6), rng.uniform(0, 0.2)) for _ in range(8)),
        # It syncs six times to bring its folder in order, then six or eight times an epoch.
        *(Doom(rng.choice(["before sync", "after sync"]), rng.randint(1, 14)) for _ in range(6)),
        *(Doom("byte", rng.randint(1, 1200)) for _ in range(4)),
    ]
    rng.shuffle(drawn)
    return drawn


@pytest.mark.slow
def test_killed_two_dozen_times_the_run_ends_with_the_same_bits(
    tmp_path: Path, digits_float: Path, server: ForkServerContext
) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    folder.mkdir()
    assert Life(server, alone, digits_float).end() == 0, (alone / "stderr.txt").read_text()
    start = time.monotonic()
    Life(server, tmp_path, digits_float, Doom("step", 1)).end()
    seconds_to_start = time.monotonic() - start

    torn = 0
    reached = []
    for doom in dooms(seconds_to_start):
        code = Life(server, folder, digits_float, doom).end()
        assert code == -signal.SIGKILL, (doom, (folder / "stderr.txt").read_text()[-2000:])
        torn += bool(partials(folder))
        if (folder / RUN).exists():
            names = {path.name for path in (folder / RUN).iterdir()}
            assert {"config.json", "resume.pt"} <= names  # from its first moment on the folder can be resumed
            assert "result.json" not in names
            reached.append(epochs(folder))
    # The kills fell where they were meant to: in the middle of files, and before, between and after epochs.
    assert torn >= 4
    assert reached == sorted(reached)
    assert len(set(reached)) >= 5
    assert reached[-1] < EPOCHS - 2  # what follows needs an epoch

    # Then the gentler ends: asked to stop, a full disk (no file may grow beyond 20 kB), and left alone at last.
    life = Life(server, folder, digits_float)
    until = time.monotonic() + PATIENCE
    while epochs(folder) == reached[-1] and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(life.process.pid or 0, signal.SIGTERM)
    told = (folder / "stderr.txt").read_text
    assert life.end() == 130, told()
    assert told().splitlines()[-1].endswith(f"resume with: robustq harden --resume {RUN}")
    assert Life(server, folder, digits_float, file_size=20_000).end() == 2
    assert "File too large" in told().splitlines()[-1]
    assert Life(server, folder, digits_float).end() == 0, told()

    expected, got = outcome(alone / RUN), outcome(folder / RUN)
    assert len(expected["rows"]) == EPOCHS
    assert got["rows"] == expected["rows"]
    assert got["result"] == expected["result"]
    for name in ("best.pt", "last.pt"):
        for key, value in expected[name].items():
            assert torch.equal(got[name][key], value), (name, key)  # bit for bit
    assert {path.name for path in (folder / RUN).iterdir()} == {path.name for path in (alone / RUN).iterdir()}
    assert partials(folder / RUN) == []


@pytest.mark.slow
def test_of_processes_that_want_one_folder_one_writes_it(
    tmp_path: Path, digits_float: Path, server: ForkServerContext
) -> None:
    first, second = Life(server, tmp_path, digits_float), Life(server, tmp_path, digits_float)
    lock = tmp_path / RUN / "run.lock"
    until = time.monotonic() + PATIENCE
    while len(alive := [life for life in (first, second) if life.process.is_alive()]) > 1:
        assert time.monotonic() < until
        time.sleep(0.05)
    (winner,) = alive
    (loser,) = {first, second} - {winner}
    assert loser.end() == 2
    told = (tmp_path / "stderr.txt").read_text
    # The second to arrive finds the folder, or the lock in it: either names what to do.
    assert f"robustq: {RUN} " in told()
    while not lock.exists():
        time.sleep(0.05)
    while not lock.read_text():
        time.sleep(0.05)
    before = len(told())
    assert Life(server, tmp_path, digits_float).end() == 2
    # The winner goes on telling its epochs into the same file.
    (refusal,) = [line for line in told()[before:].splitlines() if line.startswith("robustq: ")]
    assert f"{RUN} is being written by process {winner.process.pid} on " in refusal
    assert winner.process.is_alive()
    winner.process.kill()
    winner.end()
    # The lock file is still there, its process is not: nothing stands in the way.
    assert lock.exists()
    assert Life(server, tmp_path, digits_float, Doom("step", 4)).end() == -signal.SIGKILL  # so it did train
