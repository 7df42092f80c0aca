"""A run's folder and its lock.

One writer for a run folder: a kernel lock, which ends with the process that holds it, however that ends.

The folder of one training run: config.json, metrics.jsonl, best.pt, last.pt, result.json, and resume.pt until then.

resume.pt is the only truth about a run that has not finished. metrics.jsonl, last.pt and best.pt are written after it,
from it; whatever moment a process is killed at, :meth:`RunFolder.reopen` brings them in line again.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from robustq.checkpoint import save_atomically, save_state
from robustq.errors import ModelFileError, OutputExistsError, RunLockedError, UsageError
from robustq.files import atomic_folder, check_new, remove_partials, write_text_atomically
from robustq.hardening.metrics import TensorBoardLogger
from robustq.models.fx.factory import runs_user_code
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.torch_file import read_checkpoint

LOCK = "run.lock"
"""The lock file in the folder; its text (process, host, since when) is for people only, what counts is the lock."""


class RunLock:
    """Held from :meth:`acquire` to :meth:`release`, or to the end of the process.

    Args:
        folder: an existing run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._lock = FileLock(self._path, thread_local=False)

    def acquire(self) -> None:
        """Take the lock or fail at once.

        Raises:
            RunLockedError: another run holds it; names its process and host.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise RunLockedError(
                f"{self._folder} is being written by {_holder(self._path)}; wait until it has ended, or stop it "
                "(Ctrl-C or kill saves first)"
            ) from error
        about = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
        }
        # In place: a renamed file would carry the name away from the lock.
        self._path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Give it back and take the file away."""
        if self._lock.is_locked:
            # Before the lock is given up: whoever opened the file just now sees that it has no name any more.
            self._path.unlink(missing_ok=True)
            self._lock.release()


def check_not_running(folder: Path) -> None:
    """Refuse a folder that another run is writing.

    Raises:
        RunLockedError: names its process and host.
    """
    if (folder / LOCK).exists():
        lock = RunLock(folder)
        lock.acquire()
        lock.release()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it took the lock a moment ago and has not said who it is


RUNS = Path("runs")
LAST_HARDENED = "last-hardened"

CONFIG, METRICS, RESULT, RESUME = "config.json", "metrics.jsonl", "result.json", "resume.pt"
FORMAT = "robustq-resume"
VERSION = 1


class RunFolder:
    """A run folder that this process, and no other, writes. Use it in a ``with`` block, which gives the lock back.

    It is the trainer's :class:`robustq.hardening.state.Checkpointer`.

    Args:
        path: where.
        config: what config.json says.
        lock: held.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: RunLock) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._board = TensorBoardLogger(path) if config["recipe"].get("tensorboard") else None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], state: dict[str, Any]) -> Self:
        """A new folder; it appears with config.json and resume.pt in it, so that it can be resumed from then on.

        Args:
            path: must not exist.
            config: command, resolved recipe, spec, data, seed, device, versions: JSON types.
            state: of the training before its first step.

        Raises:
            OutputExistsError: ``path`` exists.
            OSError: it cannot be written.
        """
        config = json.loads(json.dumps(config))  # as a process that resumes it will see it: lists, no tuples
        with atomic_folder(path) as partial:
            write_text_atomically(partial / CONFIG, json.dumps(config, indent=2) + "\n")
            _write_resume(partial, state)
        return cls._locked(path, config)

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """The folder of a run that has not finished, to go on with; files that a kill left behind are put in order.

        Raises:
            UsageError: no such folder, no run folder, one without resume.pt, or a finished run.
            RunLockedError: the run is still going.
            ModelFileError: resume.pt is broken or of another version.
        """
        # Before the lock writes anything: what is no run folder, or a finished one, stays untouched.
        read_config(path)
        check_unfinished(path)
        lock = RunLock(path)
        lock.acquire()
        try:
            config = read_config(path)
            check_unfinished(path)
            folder = cls(path, config, lock)
            remove_partials(path)
            folder._write_copies(folder.load(), last=None, best=True)
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def _locked(cls, path: Path, config: dict[str, Any]) -> Self:
        lock = RunLock(path)
        lock.acquire()
        return cls(path, config, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        self._lock.release()

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return resume_command(self.path, self.config)

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        """See :meth:`robustq.hardening.state.Checkpointer.save`.

        Raises:
            OSError: a file cannot be written; the state saved before is as it was.
        """
        _write_resume(self.path, state)
        if epoch_ended:
            self._write_copies(state, last=True, best=is_best)

    def load(self) -> dict[str, Any]:
        """The state that was saved last, its tensors on the CPU.

        Raises:
            ModelFileError: resume.pt is broken or of another version.
        """
        path = self.path / RESUME
        content = read_checkpoint(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ModelFileError(
                f"{path}: is no state of a run that this robustq reads (format {FORMAT}, version {VERSION}); "
                "best.pt and last.pt beside it can still be used"
            )
        state: dict[str, Any] = content["state"]
        return state

    def progress(self) -> str:
        """How far the saved state has come, for a message: ``epoch 3 and 12 batches``.

        Raises:
            ModelFileError: as :meth:`load`.
        """
        standing = self.load()["standing"]
        return f"epoch {standing['epoch']}" + (f" and {standing['step']:,} batches" if standing["step"] else "")

    @property
    def finished(self) -> bool:
        """Whether result.json is there."""
        return (self.path / RESULT).exists()

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, the sign that the run is complete, and remove what only resuming needs."""
        write_text_atomically(self.path / RESULT, json.dumps(result, indent=2) + "\n")
        (self.path / RESUME).unlink(missing_ok=True)

    def _write_copies(self, state: dict[str, Any], *, last: bool | None, best: bool) -> None:
        """metrics.jsonl, last.pt (None: where the state stands between epochs, so that its weights are an epoch's) and
        best.pt.
        """
        standing = state["standing"]
        rows: list[dict[str, Any]] = standing["rows"]
        if not rows:
            return
        write_text_atomically(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        if self._board is not None:
            self._board.follow(rows)
        if last or (last is None and standing["step"] == 0):
            self._save("last.pt", state.get("judged") or state["model"], rows[-1])
        if best:
            self._save("best.pt", standing["best_weights"], rows[standing["best_epoch"] - 1])

    def _save(self, name: str, weights: dict[str, Any], row: dict[str, Any]) -> None:
        recipe = self.config["recipe"]
        info = {
            "recipe": recipe["name"],
            "method": recipe["method"],
            "seed": self.config["seed"],
            "versions": self.config["versions"],
            **{key: row[key] for key in ("epoch", "holdout_clean_accuracy", "holdout_pgd10_accuracy")},
        }
        save_state(self.path / name, weights, ModelSpec.from_dict(self.config["spec"]), info=info)


def _write_resume(folder: Path, state: dict[str, Any]) -> None:
    save_atomically({"format": FORMAT, "version": VERSION, "state": state}, folder / RESUME)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder.

    Raises:
        UsageError: no such folder, or no run folder.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise UsageError(f"{path}: {what}; give the folder of a run, such as runs/NAME")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: has no readable {CONFIG}, so it is not the folder of a run") from error
    if not isinstance(config, dict) or not {"recipe", "spec", "seed"} <= config.keys():
        raise UsageError(f"{path}: its {CONFIG} does not describe a run of robustq train or harden")
    return config


def check_unfinished(path: Path) -> None:
    """Refuse to resume what cannot go on.

    Raises:
        UsageError: the run has finished, or has no resume.pt.
    """
    if (path / RESULT).exists():
        raise UsageError(
            f"{path} has finished{_early_end(path)}, nothing is left to resume; its best weights are in "
            f"{path / 'best.pt'}"
        )
    if not (path / RESUME).is_file():
        raise UsageError(
            f"{path}: has no {RESUME}, without which a run cannot go on (an older robustq kept none); start it again "
            "with another --out"
        )


def _early_end(path: Path) -> str:
    """That the finished run in ``path`` ended before its last epoch, and why; empty where it did not."""
    try:
        collapsed = json.loads((path / RESULT).read_text(encoding="utf-8"))["collapsed"]
        if collapsed is None:
            return ""
        return (
            f" after {collapsed['epoch']} of {collapsed['planned']} epochs, since robust accuracy collapsed (to train "
            "on regardless, start a new run with --set stop_on_collapse=false)"
        )
    except (OSError, ValueError, KeyError, TypeError):  # another version's: it has finished all the same
        return ""


def resume_command(path: Path, config: dict[str, Any]) -> str:
    """What to type to go on with the run in ``path``: the user's own code is named again, or it would not be run."""
    architecture = str(config["spec"].get("architecture"))
    own = f" --model {shlex.quote(architecture)}" if runs_user_code(architecture) else ""
    return f"robustq {config['command']} --resume {shlex.quote(str(path))}{own}"


def check_new_run(path: Path) -> None:
    """Refuse an explicit run folder that exists, saying what it is.

    Raises:
        RunLockedError: another run is writing it.
        OutputExistsError: it exists.
        UsageError: the folder it would lie in cannot be written.
    """
    if (path / CONFIG).is_file():
        check_not_running(path)
        config = read_config(path)
        if (path / RESUME).is_file() and not (path / RESULT).exists():
            raise OutputExistsError(
                f"{path} exists already and holds a run that has not finished: {resume_command(path, config)} "
                "continues it; or name another --out"
            )
    check_new(path)


def remember_hardened(run: Path) -> None:
    """Note in ``runs/last-hardened`` which run ``robustq export`` takes by default.

    The run itself is complete by then: where the note cannot be written, export needs the model's name, and no more.
    """
    try:
        RUNS.mkdir(exist_ok=True)
        write_text_atomically(RUNS / LAST_HARDENED, f"{run.absolute()}\n")
    except OSError as error:
        note(f"could not write {RUNS / LAST_HARDENED} ({error.strerror}); name the model when you export it")


def last_hardened() -> Path:
    """best.pt of the last hardened model.

    Raises:
        UsageError: nothing has been hardened below this folder yet, or the run is gone.
    """
    pointer = RUNS / LAST_HARDENED
    if not pointer.is_file():
        raise UsageError(
            f"no model given and no {pointer} here; give a model file, or run 'robustq harden MODEL' first"
        )
    model = Path(pointer.read_text(encoding="utf-8").strip()) / "best.pt"
    if not model.is_file():
        raise UsageError(f"{pointer} names {model}, which is gone; give a model file")
    return model
