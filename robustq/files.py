"""Input files: opened in one place, checked. Output files: atomic writes and free names."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from robustq.errors import ModelFileError, OutputExistsError, RobustqError, UsageError


def open_regular(path: Path, *, error: type[RobustqError] = ModelFileError) -> BinaryIO:
    """Open a regular file for reading. A pipe could block for ever, and a device may have no end.

    Raises:
        error: it is missing, unreadable, or not a regular file.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise error(f"{path}: cannot be read ({getattr(cause, 'strerror', None) or cause})") from cause
    raise error(f"{path}: is not a regular file; give a file, not a folder, a pipe or a device")


def optional_path(given: Path | str | None) -> Path | None:
    """A path that a caller may give as text; None stays None."""
    return None if given is None else Path(given)


def check_model_file(path: Path) -> Path:
    """Return ``path`` if it is a file with content.

    Raises:
        ModelFileError: it is missing, empty, or a folder (the message names the model file in it).
    """
    if not path.exists():
        raise ModelFileError(
            f"{path}: no such file; give a model.pt, best.pt or last.pt that robustq or torch.save wrote"
        )
    if path.is_dir():
        inside = [path / name for name in ("best.pt", "last.pt", "model.pt") if (path / name).is_file()]
        raise ModelFileError(f"{path}: is a folder; give the .pt file in it" + (f": {inside[0]}" if inside else ""))
    open_regular(path).close()
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path}: is empty (0 bytes); copy or train it again")
    return path


def check_export_folder(path: Path) -> Path:
    """Return ``path`` if it is a folder.

    Raises:
        ModelFileError: it is missing, or a file.
    """
    if not path.exists():
        raise ModelFileError(f"{path}: no such folder; give the folder that 'robustq export' wrote")
    if not path.is_dir():
        if path.suffix == ".onnx":
            raise ModelFileError(
                f"{path}: is a lone .onnx; give the export folder that it lies in, or robustq attack the file alone"
            )
        raise ModelFileError(f"{path}: is not an export folder; give the folder that 'robustq export' wrote")
    return path


def check_attackable(path: Path) -> Path:
    """Return ``path`` if it is a model file, or a folder that is no run folder.

    Raises:
        ModelFileError: it is missing, or a run folder (the message names the model file in it).
    """
    if path.is_dir():
        if (path / "best.pt").is_file() and not any(path.glob("*.onnx")):
            raise ModelFileError(
                f"{path}: is a run folder, not an export folder; give the model in it: {path / 'best.pt'}"
            )
        return path
    return check_model_file(path)


PARTIAL = ".partial"
"""Ending of files that are being written; their names start with a dot."""


@contextmanager
def partial_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside ``path``; if the block has not renamed it, it is removed, with the folders made for it."""
    with made_parents(path):
        partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL}")
        try:
            with partial.open("x+b") as file:  # mode 0666 without the umask's bits
                yield partial, file
        except OSError as error:
            if error.filename is None or Path(error.filename) == partial:  # write() and fsync() name no file
                error.filename = str(path)
            raise
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make the folders above ``path``; after the block, those that are new and empty are removed again."""
    missing = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # not empty: something was written
                folder.rmdir()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends without an exception, and is removed otherwise.

    Content and name are flushed to the disk: after a crash of the machine too, ``path`` holds either the old content or
    the new one.

    Raises:
        OSError: it cannot be written (a full disk, say); its ``filename`` is ``path``, which is unchanged.
    """
    with partial_file(path) as (partial, file):
        yield file
        sync_file(file)
        partial.replace(path)
    sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Flush the content of ``file`` to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk: a crash of the machine may undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: Path) -> None:
    """Remove the unfinished files of a killed process; no other process may be writing to ``folder``."""
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8: see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def free_path(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ... if it exists; for default names only."""
    return next(path for path in free_names(wanted) if not path.exists())


def free_names(wanted: Path, suffix: str = "") -> Iterator[Path]:
    """Names for an output: ``wanted`` with ``suffix``, then with ``-2``, ``-3``, ... in front of the suffix."""
    yield wanted.with_name(f"{wanted.name}{suffix}")
    for number in count(2):
        yield wanted.with_name(f"{wanted.name}-{number}{suffix}")


def check_new(path: Path) -> Path:
    """Return ``path``, an explicit output path.

    Raises:
        OutputExistsError: it exists.
        UsageError: its folder cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path} exists already; nothing is overwritten: name another --out or remove it")
    _check_writable(path)
    return path


def check_output(out: Path | None, default: Path) -> None:
    """Check that a result can be written to ``out``, or without it below ``default``.

    Raises:
        OutputExistsError, UsageError: as :func:`check_new`.
    """
    if out is not None:
        check_new(out)
    else:
        _check_writable(default / "x")


def _check_writable(path: Path) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()  # permission bits do not tell of a file system for reading only
    except OSError as error:
        raise UsageError(
            f"--out {path} cannot be written below {parent} ({error.strerror}); name another --out"
        ) from error
