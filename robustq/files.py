"""Checks of input files before torch is loaded, atomic writes, and free names for results."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from robustq.errors import ModelFileError, OutputExistsError, UsageError


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
                f"{path}: is a lone .onnx, without the model.pt whose gradients find the attacks; "
                "give the export folder that it lies in"
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
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends without an exception, and is removed otherwise.

    Content and name are flushed to the disk: after a crash of the machine too, ``path`` holds either the old content or
    the new one.

    Raises:
        OSError: it cannot be written (a full disk, say); its ``filename`` is ``path``, which is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the errors of write() and fsync() do not name the file
        raise


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
    candidate, number = wanted, 2
    while candidate.exists():
        candidate = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return candidate


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
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--out {path} cannot be written below {parent}; name another --out")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``path`` when the block ends without an exception, and removed otherwise.

    Raises:
        OutputExistsError: another process made ``path`` while the block ran.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            raise OutputExistsError(f"{path} was made by another run in the meantime; name another --out")
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
