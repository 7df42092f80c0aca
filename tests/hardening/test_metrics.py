"""An epoch's row, the memory in it, and TensorBoard's files that follow the rows.

TensorBoard's writer is replaced by a fake one, so that this runs where the package is not installed.
"""

from __future__ import annotations

import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.hardening.metrics import MACHINE_KEYS, TensorBoardLogger, peak_memory
from tests.hardening.tiny import IMAGES, finish, network, recipe, training

CPU = torch.device("cpu")


def test_a_row_has_every_number_under_one_name() -> None:
    running = training(network(), recipe(epochs=1))
    finish(running)
    (found,) = running.state.rows
    rates = {"images_per_second", "loading_share", "peak_memory_bytes", "peak_memory_of", "seconds", "lr"}
    means = {"loss", "cross_entropy", "train_accuracy"}
    heldout = {"holdout_clean_accuracy", "holdout_pgd10_accuracy"}
    inspected = {"feature_norm", "logit_margin", "input_gradient_norm", "zero_gradients"}
    assert found.keys() == {"epoch"} | means | heldout | inspected | rates and set(MACHINE_KEYS) <= rates
    # The scripted monitor takes no time to speak of.
    assert found["images_per_second"] * found["seconds"] == pytest.approx(IMAGES, rel=0.5)
    assert 0 <= found["loading_share"] < 1


def test_memory_on_a_cpu_is_the_process() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = peak_memory(CPU)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert found["peak_memory_of"] == "process"
    assert 1e8 < before <= found["peak_memory_bytes"] <= after  # torch alone takes over 100 MB


ROWS: list[dict[str, Any]] = [
    {"epoch": 1, "loss": 2.0, "holdout_pgd10_accuracy": None, "peak_memory_of": "process", "lr": 0.1},
    {"epoch": 2, "loss": 1.0, "holdout_pgd10_accuracy": 0.5, "peak_memory_of": "process", "lr": 0.1},
]


class FakeWriter:
    """Records the calls of ``SummaryWriter`` in a file of its own."""

    made: list[FakeWriter]

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
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setattr(FakeWriter, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter.made


def test_each_row_is_written_once_and_only_its_numbers(writers: list[FakeWriter], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert writers == []  # nothing before the first epoch
    logger.update(ROWS[:1])
    logger.update(ROWS)
    logger.close()
    (writer,) = writers
    assert writer.scalars == [
        ("loss", 2.0, 1),
        ("lr", 0.1, 1),
        ("loss", 1.0, 2),
        ("holdout_pgd10_accuracy", 0.5, 2),
        ("lr", 0.1, 2),
    ]
    assert writer.closed and writer.file.read_text() == repr(writer.scalars)


def test_another_process_writes_all_rows_of_the_run_again(writers: list[FakeWriter], tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    mine = tmp_path / "tensorboard" / "mine.txt"
    mine.write_text("mine")
    TensorBoardLogger(tmp_path).update(ROWS)  # and dies; its second row is in no saved state
    TensorBoardLogger(tmp_path).update(ROWS[:1])
    assert sorted(path.name for path in mine.parent.iterdir()) == [writers[1].file.name, "mine.txt"]
    assert writers[1].scalars == writers[0].scalars[:2]
