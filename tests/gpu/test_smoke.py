"""Every method, attack and path on a GPU: the tables of tests/gpu_pretend, with CUDA's own check for host waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from robustq.data import to_float
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.spec import build_model
from tests.gpu_pretend.test_attacks import WAITS as ATTACKS
from tests.gpu_pretend.test_attacks import attack, images
from tests.gpu_pretend.test_steps import STEPS, begun
from tests.gpu_pretend.test_steps import WAITS as WAITING
from tests.hardening import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda:0")


@contextmanager
def no_waits() -> Iterator[None]:
    """CUDA raises where the host would wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait(device: torch.device, name: str) -> None:
    step, batches = begun(name, device)
    step.step(next(batches), epoch=0)  # libraries load and choose kernels in the first step
    batch: Any = next(batches)
    if name in WAITING:
        loss = step.step(batch, epoch=0).loss
    else:
        with no_waits():
            loss = step.step(batch, epoch=0).loss
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["natural 32", "odgq 4", "odgq 1"])
def test_the_first_step_is_that_of_the_cpu(device: torch.device, name: str) -> None:
    losses = []
    for place in (device, tiny.CPU):
        step, batches = begun(name, place)
        losses.append(step.step(next(batches), epoch=0).loss.item())
    # Convolutions sum in another order, and an activation beside a tie gets another code.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_find_what_they_find_on_the_cpu(device: torch.device, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(device)
    x, y = images(model, device)
    here = attack(name, model, x, y, 12)[0].cpu()
    there = attack(name, model.cpu(), x.cpu(), y.cpu(), 12)[0]
    # A sign of a gradient near 0 may differ.
    assert float(((here - there).abs() > 1e-4).float().mean()) < 0.02


def test_calibration(device: torch.device) -> None:
    found = []
    for place in (device, tiny.CPU):
        torch.manual_seed(0)
        model = build_model(tiny.spec(4)).to(place)
        calibrate(model, to_float(tiny.split().images).to(place), from_scratch=True)
        found.append(torch.stack([one.log_threshold.cpu() for one in learned_thresholds(model).values()]))
    # A candidate of the grid whose error differs by rounding may take another's place: one step of 50.
    torch.testing.assert_close(found[0], found[1], atol=0.06, rtol=0)
