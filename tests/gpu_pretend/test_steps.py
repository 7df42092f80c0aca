"""Training steps on the pretended device: no mixed devices, no host waits, no blocking copies, and few kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from robustq.hardening.methods.registry import METHODS
from robustq.hardening.optimization import TrainStep
from tests.gpu_pretend.device import counting, pretended
from tests.hardening import tiny

STEPS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    # name: (method, bits, keys of the recipe, kernels of a step at ResNet-8); they may fall, not rise
    "natural 32": ("natural", 32, {}, 166),
    "natural 4": ("natural", 4, {}, 607),
    "natural 1": ("natural", 1, {}, 827),
    "odgq 4": ("odgq", 4, {}, 968),
    "odgq 1": ("odgq", 1, {}, 1245),
    "odgq noise": ("odgq", 4, {"settings": {"global_perturbation": "noise", "natural_gradient": True}}, 1146),
    "odgq per sample": ("odgq", 32, {"settings": {"tied_to": "sample", "batch_norm": "joint"}}, 323),
    "pgd": ("pgd", 4, {"settings": {"steps": 2}}, 1177),
    "fgsm-rs": ("fgsm-rs", 4, {}, 937),
    "fgsm-mep": ("fgsm-mep", 4, {}, 1259),
    "n-fgsm": ("n-fgsm", 4, {}, 926),
    "trades": ("trades", 4, {"settings": {"steps": 1}}, 1439),
    "rslad": ("rslad", 4, {"settings": {"steps": 1}}, 1333),
    "free": ("free", 4, {}, 681),
    "dq": ("dq", 4, {}, 798),
    "liet": ("liet", 4, {}, 1576),
    "nu-at": ("nu-at", 4, {}, 1314),
    "everything": ("odgq", 4, {"ema_decay": 0.99, "clip_gradient": 1.0, "awp_gamma": 0.01}, 2000),
}

WAITS = {"nu-at": {"aten._linalg_svd.default": 1}}
"""The solver of the nuclear norm reports to the host; nothing else waits."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


class Teacher:
    passes, digest = 0, torch.zeros(32, dtype=torch.uint8)

    def logits(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 10, device=x.device)


def begun(name: str, device: torch.device) -> tuple[TrainStep, Iterator[Any]]:
    """A training, and its batches."""
    method, bits, keys, _ = STEPS[name]
    recipe = tiny.recipe(method, **keys)
    model = tiny.network(bits).to(device).train()
    step = TrainStep(model, tiny.build(recipe, model, device=device, teacher=Teacher()), recipe)
    step.method.begin_epoch(0)
    return step, tiny.split().batches(tiny.BATCH, device=device, seed=3)


SLOW = ("everything", "odgq per sample")


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in STEPS])
def test_a_step_neither_waits_nor_copies(device: torch.device, name: str) -> None:
    step, batches = begun(name, device)
    batch = next(batches)
    with counting(strict=name not in WAITS) as counts:
        step.step(batch, epoch=0)
    assert counts.waits == WAITS.get(name, {})
    assert not counts.copies
    assert counts.kernels <= STEPS[name][3]


def test_every_method_is_in_the_table() -> None:
    assert {method for method, *_ in STEPS.values()} == set(METHODS)


@pytest.mark.parametrize("name", ["odgq 4", pytest.param("odgq 1", marks=pytest.mark.slow)])
def test_the_weights_are_those_of_the_cpu(device: torch.device, name: str) -> None:
    """The formulas of the device and of the CPU (`straight_through._inside`) have the same values."""
    states = []
    for place in (device, tiny.CPU):
        step, batches = begun(name, place)
        step.step(next(batches), epoch=0)
        states.append({key: value.cpu() for key, value in step.model.state_dict().items()})
    for key, value in states[0].items():
        # Float32 rounding of sums in other orders.
        torch.testing.assert_close(value, states[1][key], atol=1e-5, rtol=1e-4, msg=key)
