"""Event files follow the rows: written once each, anew by a new process. The package is another one's; here its writer
is one that takes notes, so that this runs where the package is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from robustq.errors import UsageError
from robustq.hardening import metrics as board
from robustq.hardening.metrics import TensorBoardLogger, check_tensorboard

ROWS: list[dict[str, Any]] = [
    {"epoch": 1, "loss": 2.0, "holdout_pgd10_accuracy": None, "peak_memory_of": "process", "lr": 0.1},
    {"epoch": 2, "loss": 1.0, "holdout_pgd10_accuracy": 0.5, "peak_memory_of": "process", "lr": 0.1},
]


class Notes:
    """Takes the calls of ``SummaryWriter`` as a file of their own."""

    made: list[Notes]

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        self.file = Path(folder) / f"events.out.tfevents.{len(self.made)}"
        self.file.write_text("")
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.append((key, value, step))

    def flush(self) -> None:
        self.file.write_text(repr(self.scalars))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[Notes]:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Notes
    monkeypatch.setattr(Notes, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Notes.made


def test_each_row_is_written_once_and_only_its_numbers(notes: list[Notes], tmp_path: Path) -> None:
    writing = TensorBoardLogger(tmp_path)
    assert notes == []  # nothing before the first epoch
    writing.follow(ROWS[:1])
    writing.follow(ROWS)
    writing.close()
    (writer,) = notes
    assert writer.scalars == [
        ("loss", 2.0, 1),
        ("lr", 0.1, 1),
        ("loss", 1.0, 2),
        ("holdout_pgd10_accuracy", 0.5, 2),
        ("lr", 0.1, 2),
    ]
    assert writer.closed and writer.file.read_text() == repr(writer.scalars)


def test_another_process_begins_anew_with_what_the_run_knows(notes: list[Notes], tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    mine = tmp_path / "tensorboard" / "mine.txt"
    mine.write_text("mine")
    TensorBoardLogger(tmp_path).follow(ROWS)  # and dies; its second row is in no saved state
    TensorBoardLogger(tmp_path).follow(ROWS[:1])
    assert sorted(path.name for path in mine.parent.iterdir()) == [notes[1].file.name, "mine.txt"]
    assert notes[1].scalars == notes[0].scalars[:2]


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_package_is_one_clear_line(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "tensorboard" else None)
    assert board.importlib.util.find_spec("tensorboard") is found  # type: ignore[attr-defined]
    if installed:
        check_tensorboard()
        return
    with pytest.raises(UsageError, match="pip install tensorboard, or leave it out") as raised:
        check_tensorboard()
    assert "\n" not in str(raised.value)
