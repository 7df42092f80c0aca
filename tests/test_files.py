"""Atomic writes, also on a disk that fills up; bounded reading; seals."""

from __future__ import annotations

import errno
import io
import json
import resource
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.checkpoint import save_atomically
from robustq.errors import DataError
from robustq.files import PARTIAL, atomic_file, remove_partials
from robustq.seals import check_seal, seal
from robustq.tables import misfit, parse_bounded


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Limit files of this process to `size` bytes: like a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# 200 bytes: torch's writer fails on its first record; 20,000: in the middle of a tensor.
@pytest.mark.parametrize("size", [0, 200, 20_000])
def test_a_full_disk_raises_and_leaves_the_old_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"weights": torch.ones(3)}, path)
    before = path.read_bytes()
    with room_for(size), pytest.raises(OSError) as full:
        save_atomically({"weights": torch.zeros(100_000)}, path)
    assert full.value.errno == errno.EFBIG
    assert full.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "below" / "text"
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        (partial,) = path.parent.iterdir()
        assert partial.name.startswith(".") and partial.name.endswith(PARTIAL)
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "text") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / f".best.pt.x1y2{PARTIAL}"
    kept = [tmp_path / "best.pt", tmp_path / ".hidden", tmp_path / f"own{PARTIAL}"]
    for path in (left, *kept):
        path.write_bytes(b"x")
    remove_partials(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_every_flipped_bit_of_a_sealed_archive_is_named(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a", b"some content")
    path = tmp_path / "a.npz"
    path.write_bytes(made.getvalue())
    check_seal(path, error=DataError)  # without a seal nothing is known
    seal(made)
    whole = made.getvalue()
    path.write_bytes(whole)
    check_seal(path, error=DataError)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a") == b"some content"
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="is damaged"):
            check_seal(path, error=DataError)
    for length in range(1, 79):
        path.write_bytes(whole[:-length])
        with pytest.raises(DataError, match="is damaged"):
            check_seal(path, error=DataError)


@pytest.mark.parametrize("length", [5, 79, 2000])
def test_the_comment_of_another_program_is_no_broken_seal(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"some content")
        archive.comment = b"c" * length
    check_seal(path, error=DataError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 33 + "]" * 33, "nested too deeply"),
        ("[18446744073709551616]", "an integer of more than 64 bits"),
        ("[" + "9" * 5000 + "]", "integer"),
    ],
)
def test_bounded_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bounded(text, json.loads)


def test_what_is_in_bounds_is_read() -> None:
    nested: Any = 18446744073709551615
    for _ in range(31):
        nested = [nested]
    assert parse_bounded(json.dumps(nested), json.loads) == nested
    assert parse_bounded("a.b = 1979-05-27", tomllib.loads)["a"]["b"].year == 1979


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1}, {"a": int, "b?": str}, None),
        ({"a": 1, "b": None}, {"a": int, "b?": str}, None),
        ({"a": 1, "b": 2}, {"a": int, "b?": str}, "b"),
        ({}, {"a": int}, "a"),
        ({"a": {"b": [1, "2"]}}, {"a": {"b": [int]}}, "b"),
        ({"a": [1, 2]}, {"a": (int, int)}, None),
        ({"a": [1]}, {"a": (int, int)}, "a"),
        ({"a": 3}, {"a": {"b": int}}, "a"),
        (3, {"a": int}, "content"),
    ],
)
def test_the_entry_of_another_shape_is_named(value: Any, shape: Any, wrong: str | None) -> None:
    assert misfit(value, shape) == wrong
