"""The run folder: one writer, whole files, and copies that follow resume.pt wherever a kill falls."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.checkpoint import load_model
from robustq.errors import ModelFileError, OutputExistsError, RobustqError, RunLockedError, UsageError
from robustq.hardening.run_folder import RESUME, RunFolder, check_new_run, resume_command
from robustq.hardening.run_lock import LOCK
from robustq.models.spec import ModelSpec, build_model

SPEC = ModelSpec("resnet8", 32, 32, 10, 1, 8, "digits", 0.1, tuple("0123456789"))
CONFIG: dict[str, Any] = {
    "command": "harden",
    "recipe": {"name": "test", "method": "natural", "epochs": 3},
    "spec": SPEC.to_dict(),
    "data": {"name": "digits", "digest": "0", "skip_bad_images": False},
    "seed": 0,
    "device": "cpu",
    "versions": {},
}


def weights(value: float) -> dict[str, torch.Tensor]:
    state = build_model(SPEC).state_dict()
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


def state(epoch: int, *, step: int = 0, best: int = 0) -> dict[str, Any]:
    """The parts of a state that the folder reads: every weight of epoch n is n, plus a half within the next."""
    rows = [
        {"epoch": n, "loss": 1 / n, "holdout_clean_accuracy": n / 10, "holdout_pgd10_accuracy": None}
        for n in range(1, epoch + 1)
    ]
    progress = {"epoch": epoch, "step": step, "rows": rows, "best_epoch": best, "best_weights": weights(best)}
    return {"standing": progress, "model": weights(epoch + 0.5 * (step > 0))}


def held(path: Path) -> float:
    model, _, _ = load_model(path)
    return model.get_parameter("fc.weight")[0, 0].item()


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def made(path: Path) -> RunFolder:
    return RunFolder.create(path, CONFIG, state(0))


def test_a_run_from_its_first_file_to_its_last(tmp_path: Path) -> None:
    path = tmp_path / "below" / "run"
    with made(path) as folder:
        assert names(path) == {"config.json", RESUME, LOCK}
        assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
        folder.save(state(1, best=1), epoch_ended=True, is_best=True)
        folder.save(state(2, best=1), epoch_ended=True, is_best=False)
        assert (held(path / "last.pt"), held(path / "best.pt")) == (2, 1)
        folder.save(state(2, step=1, best=1), epoch_ended=False, is_best=False)
        assert held(path / "last.pt") == 2
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert folder.load()["standing"]["step"] == 1
        info = load_model(path / "best.pt")[2]
        assert (info["epoch"], info["holdout_clean_accuracy"], info["recipe"], info["seed"]) == (1, 0.1, "test", 0)
        folder.finish({"clean_accuracy": 0.5})
    assert names(path) == {"config.json", "metrics.jsonl", "best.pt", "last.pt", "result.json"}


def test_the_last_weights_are_those_that_were_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "run"
    averaged = {**state(2, best=1), "judged": weights(7)}
    with made(path) as folder:
        folder.save(averaged, epoch_ended=True, is_best=True)
        assert (held(path / "last.pt"), held(path / "best.pt")) == (7, 1)
        (path / "last.pt").unlink()  # as if killed before it was written
    with RunFolder.reopen(path) as folder:
        folder.repair(folder.load())
        assert held(path / "last.pt") == 7
        folder.save({**state(3, best=1), "judged": None}, epoch_ended=True, is_best=False)
        assert held(path / "last.pt") == 3


def test_a_folder_that_exists_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        made(tmp_path / "run")
    assert names(tmp_path / "run") == {"mine.txt"}


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # config.json fits, resume.pt does not
    try:
        with pytest.raises(OSError):
            made(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == set()


HOLDER = """
import sys, time
from pathlib import Path
from robustq.hardening.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if sys.argv[2] == "fork":
    import os
    if os.fork() == 0:
        # Said by the child: before its first line of Python runs, the fork's hooks have let go of the inherited lock.
        print(os.getpid(), flush=True)
else:
    print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fork", ["fork", "alone"])
def test_the_lock_dies_with_its_process(tmp_path: Path, fork: str) -> None:
    path = tmp_path / "run"
    made(path).__exit__(None, None, None)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), fork], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = holder.stdout.readline().strip()
    try:
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on"):
            RunFolder.reopen(path)
        holder.kill()
        holder.wait()
        # A worker process that outlives the run for a moment does not hold its lock.
        with RunFolder.reopen(path):
            pass
    finally:
        holder.kill()
        if fork == "fork":
            os.kill(int(child), signal.SIGKILL)


def test_copies_follow_the_state_after_a_kill_between_the_writes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with made(path) as folder:
        folder.save(state(1, best=1), epoch_ended=True, is_best=True)
        old = {name: (path / name).read_bytes() for name in ("best.pt", "last.pt", "metrics.jsonl")}
        folder.save(state(2, best=2), epoch_ended=True, is_best=True)
        new = {name: (path / name).read_bytes() for name in old}
    # Killed after resume.pt: the copies are those of the epoch before, or half written under another name.
    for name, content in old.items():
        (path / name).write_bytes(content)
    (path / ".last.pt.abc.partial").write_bytes(b"half")
    with RunFolder.reopen(path) as folder:
        folder.repair(folder.load())
        assert names(path) == {"config.json", RESUME, LOCK, *old}
        assert (path / "metrics.jsonl").read_bytes() == new["metrics.jsonl"]
        assert (held(path / "last.pt"), held(path / "best.pt")) == (2, 2)


def broken(path: Path, case: str) -> None:
    """Something at ``path`` that cannot be resumed."""
    if case == "a file":
        path.write_text("x")
    elif case in ("no config", "another config"):
        path.mkdir()
        if case == "another config":
            (path / "config.json").write_text("[]")
    elif case != "nothing":
        with made(path) as folder:
            if case == "finished":
                folder.finish({})
        if case == "no state":
            (path / RESUME).unlink()
        if case == "half a state":
            (path / RESUME).write_bytes((path / RESUME).read_bytes()[:1000])
        if case == "another state":
            torch.save({"state": {}}, path / RESUME)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("nothing", UsageError, "no such folder"),
        ("a file", UsageError, "is a file"),
        ("no config", UsageError, "has no config.json"),
        ("another config", UsageError, "holds no table"),
        ("finished", UsageError, "has finished, nothing is left"),
        ("no state", UsageError, "has no resume.pt"),
        ("half a state", ModelFileError, "broken or truncated"),
        ("another state", ModelFileError, "no state of a run"),
    ],
)
def test_what_cannot_be_resumed_says_why_and_is_not_changed(
    tmp_path: Path, case: str, error: type[RobustqError], words: str
) -> None:
    path = tmp_path / "run"
    broken(path, case)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(error, match=words), RunFolder.reopen(path) as folder:
        folder.load()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_out_that_holds_an_unfinished_run_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "run"
    made(path).__exit__(None, None, None)
    with pytest.raises(OutputExistsError, match=f"robustq harden --resume {path} continues it"):
        check_new_run(path)
    with RunFolder.reopen(path) as folder:
        folder.finish({})
    with pytest.raises(OutputExistsError, match="nothing is overwritten"):
        check_new_run(path)
    check_new_run(tmp_path / "other")


@pytest.mark.parametrize(
    ("path", "architecture", "typed"),
    [
        ("runs/two words", "torchvision:mobilenet_v2", "robustq harden --resume 'runs/two words'"),
        ("runs/a", "nets.small:build", "robustq harden --resume runs/a --model nets.small:build"),
    ],
)
def test_the_resume_command_can_be_pasted_into_a_shell(path: str, architecture: str, typed: str) -> None:
    assert resume_command(Path(path), {**CONFIG, "spec": {"architecture": architecture}}) == typed
