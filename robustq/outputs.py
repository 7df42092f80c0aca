"""New files and folders: written whole under a hidden name, then renamed to a name that nobody has taken."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from robustq.errors import OutputExistsError, RobustqWarning
from robustq.files import free_names, made_parents, partial_file, sync_file, sync_folder


def write_new(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file that did not exist, whole or not at all.

    Returns:
        ``path``; or ``NAME-2``, ``NAME-3``, ..., with a warning, if another process has made it in the meantime.

    Raises:
        OSError: as :func:`atomic_file`.
    """
    with partial_file(path) as (partial, file):
        write(file)
        sync_file(file)
        names = free_names(path.with_suffix(""), path.suffix)
        final = next(name for name in names if _takes_name(partial, name))
    sync_folder(path.parent)
    warn_of_other_name(path, final)
    return final


PARTIAL_FOLDER = ".robustq-partial"
"""Ending of folders that are being written; their names start with a dot."""


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``; if the block has not published it (:func:`publish`), it is removed, and so are new
    folders above it.

    A kernel lock marks it as long as this process lives. Folders that killed processes left there are removed.
    """
    with ExitStack() as stack:
        stack.enter_context(made_parents(path))
        for folder in path.parent.glob(f".*{PARTIAL_FOLDER}"):
            with suppress(OSError), _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
        while True:
            partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL_FOLDER}")
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir()  # mode 0777 without the umask's bits
            try:
                stack.enter_context(_locked(partial))
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took it for one that was left behind
            except OSError:
                pass  # a file system without locks
            break
        yield partial


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the kernel lock of an existing folder.

    Raises:
        OSError: BlockingIOError if another process holds it, FileNotFoundError if the folder is gone.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()  # gone, if it was removed between the two lines above
        yield
    finally:
        os.close(handle)


def publish(partial: Path, path: Path, *, numbered: bool = False) -> Path:
    """Rename the folder of :func:`partial_folder` to ``path``.

    Args:
        numbered: if another process has made ``path`` in the meantime, take ``path-2``, ...

    Returns:
        The new path.

    Raises:
        OutputExistsError: another process has made ``path``.
    """
    names = free_names(path) if numbered else [path]
    final = next((name for name in names if _takes_name(partial, name)), None)
    if final is None:
        raise OutputExistsError(f"{path} was made by another run in the meantime; name another --out")
    sync_folder(path.parent)
    return final


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``path`` when the block ends without an exception, and removed otherwise.

    Raises:
        OutputExistsError: another process made ``path`` while the block ran.
    """
    with partial_folder(path) as partial:
        yield partial
        publish(partial, path)


def _takes_name(partial: Path, name: Path) -> bool:
    """Give a file a second name, or a folder another one, unless it is taken: False then."""
    if os.path.lexists(name):  # a rename would replace an empty folder
        return False
    try:
        if partial.is_dir():
            partial.rename(name)
        else:
            os.link(partial, name)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        if partial.is_dir() or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        partial.rename(name)  # a file system without links
    return True


def warn_of_other_name(wanted: Path, final: Path) -> None:
    """Warn that an output has another name than wanted."""
    if final != wanted:
        warnings.warn(f"{wanted} was made by another process in the meantime; this is {final}", RobustqWarning, 3)
