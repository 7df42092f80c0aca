"""The forecast is measured on steps that are undone: the run that follows has the bits of one without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from robustq.hardening.forecast import copied, forecast
from robustq.hardening.run_folder import RESUME, RunFolder
from robustq.hardening.state import StopRequest
from tests.hardening.test_resume import begun, uninterrupted
from tests.hardening.tiny import finish, same, spec


@pytest.mark.parametrize(
    ("method", "bits", "keys"),
    [
        ("natural", 4, {}),
        ("odgq", 0, {"global_perturbation": "noise"}),  # a generator of the method's own, and dropout's
    ],
)
def test_nothing_is_left_of_the_rehearsal(method: str, bits: int, keys: dict[str, Any]) -> None:
    training, _ = begun(method, bits, keys, init=0)
    before = copied(training.state_dict())
    forecast(training)
    same(copied(training.state_dict()), before)
    same(finish(training).load(), uninterrupted(method, bits, keys))


def test_time_is_that_of_the_rest_of_the_run() -> None:
    training, _ = begun("natural", 0, {}, init=0)
    found = forecast(training)
    assert 0 < found.seconds < 60
    assert 1e8 < found.memory_bytes < 1e12  # torch alone takes over 100 MB, and no test machine has a terabyte


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_the_disk_is_that_of_the_files(options: dict[str, Any], tmp_path: Path) -> None:
    training, _ = begun("odgq", 4, {"domains": 3}, init=0, **options)
    told = forecast(training)
    config = {
        "command": "train",
        "recipe": {"name": "t", "method": "odgq", "epochs": 2},
        "spec": spec(4).to_dict(),
        "seed": 0,
        "versions": {},
    }
    with RunFolder.create(tmp_path / "run", config, training.state_dict()) as folder:
        training.run(folder, StopRequest())
        size = sum(file.stat().st_size for file in folder.path.iterdir())
        # Names and alignment in torch's archives: a fifth at this tiny size.
        assert told.disk_bytes <= size <= 1.3 * told.disk_bytes + 50_000
        state = (folder.path / RESUME).stat().st_size
        assert told.spare_bytes <= state <= 1.3 * told.spare_bytes + 50_000
