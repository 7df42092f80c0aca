"""The lock of a run folder: one process writes it at a time."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from robustq.errors import RunLockedError

LOCK = "run.lock"
"""The lock file in the folder; its text (process, host, since when) is for messages only."""


class RunLock:
    """Allows one writer of an existing run folder: a kernel lock, released when its process ends, even if killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._lock = FileLock(self._path, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, without waiting.

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
        # In place: a file renamed to this name would not be locked.
        self._path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._lock.is_locked:
            # Removed while locked: a process that has just opened it notices that its name is gone.
            self._path.unlink(missing_ok=True)
            self._lock.release()


def check_not_running(folder: Path) -> None:
    """Check that no other run is writing the folder.

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
        return "another process"  # it has just taken the lock and not yet written the file
