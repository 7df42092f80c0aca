"""SHA-256 of files, and seals: archives that hold their own, so that a flipped bit is named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from robustq.errors import RobustqError
from robustq.files import open_regular


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open_regular(path) as file:
        return _digest(file, file.seek(0, os.SEEK_END))


def _digest(file: BinaryIO, length: int) -> str:
    """SHA-256 of the first bytes."""
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


SEAL = b"robustq sha256:"
_SEAL_LENGTH = len(SEAL) + 64
_END_OF_ZIP = b"PK\x05\x06"
"""Signature of the last record of a zip archive: 22 bytes, the last two the comment's length; then the comment."""


def seal(archive: BinaryIO) -> None:
    """Add the SHA-256 of a whole zip archive (model.pt, .npz) as its comment.

    Zip's own checksums cover the content of the files in it, but not their names, places and sizes.
    """
    end = archive.seek(0, os.SEEK_END)
    archive.seek(end - 2)
    archive.write(_SEAL_LENGTH.to_bytes(2, "little"))  # the comment's length
    digest = _digest(archive, end)
    archive.seek(end)
    archive.write(SEAL + digest.encode())


def check_seal(path: Path, *, error: type[RobustqError]) -> None:
    """Check the SHA-256 of an archive that :func:`seal` sealed; other files pass.

    Raises:
        error: a bit or more has changed since.
    """
    with open_regular(path, error=error) as archive:
        length = archive.seek(0, os.SEEK_END) - _SEAL_LENGTH
        archive.seek(max(length - 22, 0))
        tail = archive.read()
        end = tail.rfind(_END_OF_ZIP)
        comment = tail[end + 22 :]
        # Either mark tells a sealed archive: one flipped bit cannot change both. Other programs write comments, too.
        has_length = end >= 0 and tail[end + 20 : end + 22] == _SEAL_LENGTH.to_bytes(2, "little")
        alike = sum(one == other for one, other in zip(comment, SEAL, strict=False)) > len(SEAL) // 2
        is_sealed = SEAL in tail or (has_length and (alike or len(comment) < _SEAL_LENGTH))
        if is_sealed and tail[-_SEAL_LENGTH:] != SEAL + _digest(archive, length).encode():
            raise error(
                f"{path}: is damaged (its sha256 is not the one that it was written with); copy or make it again"
            )
