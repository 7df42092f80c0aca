"""Atomic writes, also on a disk that fills up."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from robustq.checkpoint import save_atomically
from robustq.files import PARTIAL, atomic_file, remove_partials


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
