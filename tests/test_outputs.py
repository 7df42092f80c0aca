"""New outputs: the next free name, the umask, and what killed processes leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustq.errors import OutputExistsError, RobustqWarning
from robustq.files import atomic_file
from robustq.outputs import atomic_folder, partial_folder, publish, write_new

HOLDER = """
import sys, time
from pathlib import Path
from robustq.outputs import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_of_a_killed_process_is_removed_and_one_of_a_living_process_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "export")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    try:
        with partial_folder(tmp_path / "other"):
            assert (left / "half").exists()
    finally:
        holder.kill()
        holder.wait()
    assert (left / "half").exists()
    with partial_folder(tmp_path / "other"):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_outputs_take_the_next_free_name_and_replace_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert write_new(path, lambda file: file.write(b"1")) == path
    with pytest.warns(RobustqWarning, match="r-2.json"):
        assert write_new(path, lambda file: file.write(b"2")) == tmp_path / "r-2.json"
    assert path.read_bytes() == b"1"
    (tmp_path / "export").mkdir()
    with partial_folder(tmp_path / "export") as folder:
        assert publish(folder, tmp_path / "export", numbered=True) == tmp_path / "export-2"
    with pytest.raises(OutputExistsError), atomic_folder(tmp_path / "export"):
        pass
    assert {one.name for one in tmp_path.iterdir()} == {"r.json", "r-2.json", "export", "export-2"}


def test_the_umask_is_honoured(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("file", "folder")} == {"0o600", "0o700"}
