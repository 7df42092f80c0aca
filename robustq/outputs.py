"""Where results are written: names that are free, paths that may be taken, files that appear only when whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robustq.errors import OutputExistsError, UsageError


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name beside ``path``, then rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def free_path(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ... when it is taken: for default names only."""
    candidate, number = wanted, 2
    while candidate.exists():
        candidate = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return candidate


def check_new(path: Path) -> Path:
    """Return an explicit output path that does not exist yet.

    Raises:
        OutputExistsError: it does.
        UsageError: the folder it would lie in cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path} exists already; nothing is overwritten: name another --out or remove it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--out {path} cannot be written below {parent}; name another --out")
    return path


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and disappears when it does not.

    Raises:
        OutputExistsError: ``path`` was taken while the block ran.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            raise OutputExistsError(f"{path} was made by another run in the meantime; name another --out")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
