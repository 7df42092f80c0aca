"""Safetensors files: weights without code. robustq's own also hold the spec, and the file's SHA-256.

The entry ``robustq`` of the metadata is the JSON text of all of a model file but its weights. The SHA-256 in it counts
the whole file with zeros in its own place; the format allows nothing behind the tensors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustq.errors import ModelFileError, one_line
from robustq.files import open_regular
from robustq.outputs import write_new
from robustq.tables import LARGEST_TEXT, parse_bounded

OWN = "robustq"
"""Key of our entry in the metadata."""

SUFFIX = ".safetensors"

LONGEST_HEADER = 100_000_000
"""Bytes; the library's own limit."""

_BLANK = "0" * 64
_MARK = '{"format": "robustq-'
"""Start of our entry: one flipped bit does not make a file of robustq one of another program."""


def is_safetensors(path: Path, start: bytes) -> bool:
    """Whether the file at ``path`` that begins with ``start`` (9 bytes or more) is, or claims to be, such a file."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
        return True
    return path.suffix == SUFFIX and not start.startswith((b"PK", b"\x80"))


def read_safetensors(path: Path) -> dict[str, Any]:
    """The state dict in a file of others; of a file that robustq wrote, the content of its model.pt.

    Raises:
        ModelFileError: the header is truncated or contradicts itself or the file's size, or a file of robustq has
            changed since it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = one_line(error, longest=140).removeprefix("Error while deserializing header: ")
        raise ModelFileError(
            f"{path}: is no intact safetensors file ({reason}); copy it again, or save it again with safetensors"
        ) from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not any(key == OWN or _MARK in text for key, text in about.items()):
        return dict(state)
    if OWN not in about:
        raise _damaged(path)
    return {**_own_entry(path, about[OWN]), "state": state}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that another program stored beside the weights; empty for other kinds of files."""
    with open_regular(path) as file:
        if not is_safetensors(path, file.read(9)):
            return {}
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: text for key, text in (opened.metadata() or {}).items() if key != OWN}
    except SafetensorError:
        return {}


def write_safetensors(path: Path, content: dict[str, Any]) -> Path:
    """Write the content of a model.pt into a new file, whole or not at all.

    Returns:
        its path: see :func:`robustq.outputs.write_new`.
    """
    state: dict[str, Tensor] = content["state"]
    about = json.dumps({**{key: value for key, value in content.items() if key != "state"}, "sha256": _BLANK})
    # Copies: the library refuses tensors that share memory or are stored channels last.
    weights = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    raw = save(weights, metadata={OWN: about})
    digest = hashlib.sha256(raw).hexdigest().encode()
    return write_new(path, lambda file: file.write(raw.replace(_BLANK.encode(), digest, 1)))


def _own_entry(path: Path, text: str) -> dict[str, Any]:
    """What a file of robustq holds beside its weights, with the file's SHA-256 checked."""
    try:
        if len(text) > LARGEST_TEXT:
            raise ValueError("too long")
        entry = parse_bounded(text, json.loads)
    except ValueError as error:
        raise ModelFileError(f"{path}: its metadata {OWN} cannot be read ({error}); copy or write it again") from error
    known = entry.pop("sha256", None) if isinstance(entry, dict) else None
    if not isinstance(known, str) or len(known) != len(_BLANK) or _digest(path, known) != known:
        raise _damaged(path)
    found: dict[str, Any] = entry
    return found


def _damaged(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path}: is damaged (its sha256 is not the one that it was written with); copy or make it again"
    )


def _digest(path: Path, known: str) -> str:
    """SHA-256 of the file with zeros in place of the digest ``known`` in its header."""
    with open_regular(path) as file:
        header = file.read(8 + LONGEST_HEADER)
        digest = hashlib.sha256(header.replace(known.encode(), _BLANK.encode(), 1))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
