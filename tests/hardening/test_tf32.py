"""TF32: forbidden where results are judged, whatever torch's own defaults are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from robustq.workflow.setup import pick_device


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def torch_as_it_comes() -> Iterator[None]:
    before = flags()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0"])
def test_every_job_on_a_gpu_computes_in_float32(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(name).type == "cuda"
    assert flags() == (False, False)


def test_a_job_on_a_cpu_leaves_torch_alone() -> None:
    assert pick_device("cpu").type == "cpu"
    assert flags() == (True, False)
