"""The folder of one training run: config.json, metrics.jsonl, best.pt, last.pt, result.json; its lock; resuming.

Until a run has finished, resume.pt holds its state and a copy of config.json. metrics.jsonl, last.pt and best.pt are
derived from the state and written after it; if the process is killed in between, :meth:`RunFolder.repair` writes them
again.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any, Self

from robustq.checkpoint import save_atomically, save_state
from robustq.errors import ModelFileError, OutputExistsError, UsageError
from robustq.files import check_new, open_regular, remove_partials, write_text_atomically
from robustq.hardening.metrics import TensorBoardLogger
from robustq.hardening.run_config import CONFIG, first_change, read_config
from robustq.hardening.run_lock import RunLock, check_not_running
from robustq.models.fx.factory import runs_user_code
from robustq.models.spec import ModelSpec
from robustq.outputs import atomic_folder
from robustq.progress import note
from robustq.torch_file import read_checkpoint

RUNS = Path("runs")
LAST_HARDENED = "last-hardened"
LONGEST_PATH = 4096

METRICS, RESULT, RESUME = "metrics.jsonl", "result.json", "resume.pt"
FORMAT = "robustq-resume"
VERSION = 1


class RunFolder:
    """A run folder locked by this process; use it in a ``with`` block, which releases the lock.

    It is the trainer's :class:`robustq.hardening.state.Checkpointer`; ``config`` is the content of config.json.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: RunLock) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._tensorboard = TensorBoardLogger(path) if config["recipe"].get("tensorboard") else None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], state: dict[str, Any]) -> Self:
        """A new folder; it appears with config.json and resume.pt, so that the run can be resumed from then on.

        Args:
            path: must not exist.
            config: command, resolved recipe, spec, data, seed, device, versions: JSON types.
            state: of the training before its first step.

        Raises:
            OutputExistsError: ``path`` exists.
            OSError: it cannot be written.
        """
        config = json.loads(json.dumps(config))  # as a resumed run gets it: lists, no tuples
        with atomic_folder(path) as partial:
            write_text_atomically(partial / CONFIG, json.dumps(config, indent=2) + "\n")
            _write_resume(partial, state, config)
        lock = RunLock(path)
        lock.acquire()
        return cls(path, config, lock)

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """The folder of an unfinished run; nothing in it changes but its lock (see :meth:`repair`).

        Raises:
            UsageError: no such folder, no run folder, one without resume.pt, or a finished run.
            RunLockedError: the run is still going.
        """
        # Before the lock writes its file: any other folder stays unchanged.
        read_config(path)
        check_unfinished(path)
        lock = RunLock(path)
        lock.acquire()
        try:
            config = read_config(path)
            check_unfinished(path)
        except BaseException:
            lock.release()
            raise
        return cls(path, config, lock)

    def repair(self, state: dict[str, Any]) -> None:
        """Write the files that follow from ``state``, of :meth:`load`, and remove what a killed process left behind."""
        remove_partials(self.path)
        self._write_copies(state, last=None, best=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.release()

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return resume_command(self.path, self.config)

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        """See :meth:`robustq.hardening.state.Checkpointer.save`.

        Raises:
            OSError: a file cannot be written; the state saved before is unchanged.
        """
        _write_resume(self.path, state, self.config)
        if epoch_ended:
            self._write_copies(state, last=True, best=is_best)

    def load(self) -> dict[str, Any]:
        """The last saved state, with tensors on the CPU.

        Raises:
            ModelFileError: resume.pt is broken or of another version, or belongs to another config.json.
        """
        path = self.path / RESUME
        content = read_checkpoint(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ModelFileError(
                f"{path}: is no state of a run that this robustq reads (format {FORMAT}, version {VERSION}); "
                "best.pt and last.pt beside it can still be used"
            )
        state, began = content.get("state"), content.get("config")
        if not isinstance(state, dict):
            raise ModelFileError(f"{path}: holds no state; best.pt and last.pt beside it can still be used")
        if began is None:
            note(f"note    {path} is of an older robustq: {CONFIG} is taken as it is")
            return state
        try:
            changed = first_change(json.loads(began), self.config)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelFileError(f"{path}: its copy of {CONFIG} cannot be read; start a new run") from error
        if changed is not None:
            raise ModelFileError(
                f"{self.path / CONFIG}: {changed} in {RESUME}; a run goes on only as it began: put it back, or start a "
                f"new run from {self.path / 'best.pt'}"
            )
        return state

    def progress(self) -> str:
        """Progress of the saved state, for a message: ``epoch 3 and 12 batches``.

        Raises:
            ModelFileError: as :meth:`load`.
        """
        state = self.load()["standing"]
        return f"epoch {state['epoch']}" + (f" and {state['step']:,} batches" if state["step"] else "")

    @property
    def finished(self) -> bool:
        """Whether result.json exists."""
        return (self.path / RESULT).exists()

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which marks the run as finished, and remove resume.pt."""
        write_text_atomically(self.path / RESULT, json.dumps(result, indent=2) + "\n")
        (self.path / RESUME).unlink(missing_ok=True)

    def _write_copies(self, state: dict[str, Any], *, last: bool | None, best: bool) -> None:
        """Write metrics.jsonl, last.pt (``last`` None: only if the state is between two epochs) and best.pt."""
        progress = state["standing"]
        rows: list[dict[str, Any]] = progress["rows"]
        if not rows:
            return
        write_text_atomically(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        if self._tensorboard is not None:
            self._tensorboard.update(rows)
        if last or (last is None and progress["step"] == 0):
            self._save("last.pt", state.get("judged") or state["model"], rows[-1])
        if best:
            self._save("best.pt", progress["best_weights"], rows[progress["best_epoch"] - 1])

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


def _write_resume(folder: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, "config": json.dumps(config), "state": state}
    save_atomically(content, folder / RESUME)


def check_unfinished(path: Path) -> None:
    """Check that the run can be resumed.

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
    """Why the finished run in ``path`` ended before its last epoch; empty if it did not."""
    try:
        collapsed = json.loads((path / RESULT).read_text(encoding="utf-8"))["collapsed"]
        if collapsed is None:
            return ""
        return (
            f" after {collapsed['epoch']} of {collapsed['planned']} epochs, since robust accuracy collapsed (to train "
            "on regardless, start a new run with --set stop_on_collapse=false)"
        )
    except (OSError, ValueError, KeyError, TypeError):  # result.json of another version
        return ""


def resume_command(path: Path, config: dict[str, Any]) -> str:
    """The command that continues the run in ``path``; custom models must be named again, or their code is not run."""
    architecture = str(config["spec"].get("architecture"))
    own = f" --model {shlex.quote(architecture)}" if runs_user_code(architecture) else ""
    return f"robustq {config['command']} --resume {shlex.quote(str(path))}{own}"


def check_new_run(path: Path) -> None:
    """Check that an explicit run folder is free.

    Raises:
        RunLockedError: another run is writing it.
        OutputExistsError: it exists.
        UsageError: its parent folder cannot be written.
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
    """Write to ``runs/last-hardened`` which run ``robustq export`` takes by default; failing to is no error."""
    try:
        RUNS.mkdir(exist_ok=True)
        write_text_atomically(RUNS / LAST_HARDENED, f"{run.absolute()}\n")
    except OSError as error:
        note(f"could not write {RUNS / LAST_HARDENED} ({error.strerror}); name the model when you export it")


def last_hardened() -> Path:
    """best.pt of the last hardened model.

    Raises:
        UsageError: nothing has been hardened in this folder yet, or the run is gone.
    """
    pointer = RUNS / LAST_HARDENED
    if not pointer.is_file():
        raise UsageError(
            f"no model given and no {pointer} here; give a model file, or run 'robustq harden MODEL' first"
        )
    with open_regular(pointer, error=UsageError) as file:
        model = Path(os.fsdecode(file.read(LONGEST_PATH)).strip()) / "best.pt"
    if not model.is_file():
        raise UsageError(f"{pointer} names {model}, which is gone; give a model file")
    return model
