"""An epoch's row: what is counted per second, and whose memory it is."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
import torch

from robustq.hardening.metrics import MACHINE_KEYS, epoch_row, reset_peak_memory, peak_memory
from robustq.hardening.monitor import Inspection, HoldoutAccuracy

CPU = torch.device("cpu")


def row(**keys: Any) -> dict[str, Any]:
    seconds = {"seconds": 5.0, "training_seconds": 4.0, "loading_seconds": 1.0}
    common: dict[str, Any] = {"lr": 0.1, **seconds, "images": 1000, "device": CPU}
    means = {"loss": 1.5, "cross_entropy": 1.0, "train_accuracy": 0.5}
    return epoch_row(3, means, HoldoutAccuracy(0.8, 0.4), Inspection(None, 2.0, 0.25, 0.5), **{**common, **keys})


def test_images_are_counted_per_second_of_training_not_of_watching() -> None:
    found = row()
    assert (found["images_per_second"], found["seconds"], found["loading_share"]) == (250.0, 5.0, 0.25)
    assert row(training_seconds=0.0)["images_per_second"] > 0  # an epoch of which only the end is left


def test_a_row_has_every_number_under_one_name() -> None:
    found = row()
    assert set(MACHINE_KEYS) <= found.keys()
    rest = {key: value for key, value in found.items() if key not in MACHINE_KEYS}
    assert rest == {
        "epoch": 3,
        "loss": 1.5,
        "cross_entropy": 1.0,
        "train_accuracy": 0.5,
        "holdout_clean_accuracy": 0.8,
        "holdout_pgd10_accuracy": 0.4,
        "feature_norm": None,
        "logit_margin": 2.0,
        "input_gradient_norm": 0.25,
        "zero_gradients": 0.5,
        "lr": 0.1,
        "peak_memory_of": "process",
    }


def test_memory_on_a_cpu_is_the_process() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = peak_memory(CPU)
    reset_peak_memory(CPU)  # which a process cannot
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert found["peak_memory_of"] == "process"
    assert 1e8 < before <= found["peak_memory_bytes"] <= after  # torch alone takes over 100 MB


def test_memory_on_a_gpu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    forgotten: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 if device == gpu else 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    assert peak_memory(gpu) == {"peak_memory_bytes": 123, "peak_memory_of": "cuda:0"}
    reset_peak_memory(gpu)
    reset_peak_memory(CPU)
    assert forgotten == [gpu]


@pytest.mark.gpu
def test_memory_on_a_real_gpu_holds_what_was_allocated() -> None:
    gpu = torch.device("cuda:0")
    reset_peak_memory(gpu)
    start = peak_memory(gpu)["peak_memory_bytes"]
    held = torch.ones(2**20, device=gpu)
    assert peak_memory(gpu)["peak_memory_bytes"] >= start + 4 * len(held)
