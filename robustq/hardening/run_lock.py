"""One writer for a run folder: a kernel lock, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from robustq.errors import RunLockedError

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
