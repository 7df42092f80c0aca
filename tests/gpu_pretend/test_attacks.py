"""Attacks on the pretended device: no mixed devices, and few host waits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import ATTACKS, ImageGenerators
from tests.gpu_pretend.device import Counts, counting, pretended
from tests.hardening import tiny

EPSILON = 24 / 255
BUDGET = ("steps", "queries", "corners")

WAITS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: (waits of any number of steps below LOOK_EVERY, kernels of a step), they may fall, not rise; settings
    **dict.fromkeys(("gaussian_noise", "uniform_noise", "fgsm"), (0, 0, {})),
    "bim": (0, 18, {}),
    "pgd": (0, 18, {}),
    "tpgd": (0, 23, {}),
    "random_corners": (3, 109, {}),
    "pgd_plus_plus": (4, 94, {}),
    "pgd_targeted": (4, 94, {"target_classes": 1}),
    "apgd": (4, 82, {}),
    "apgd_targeted": (4, 110, {"target_classes": 1}),
    "fab": (5, 430, {}),
    "fab_targeted": (5, 175, {"target_classes": 1}),
    "square": (4, 185, {}),
    "rays": (3, 112, {}),
    "feature_space": (4, 60, {}),
    "transfer": (8, 90, {}),
}


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


def images(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels; the model is right about all but the first."""
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[:1] = (y[:1] + 1) % 10
    return x, y


def attack(name: str, model: Any, x: Tensor, y: Tensor, budget: int) -> tuple[Tensor, Counts]:
    accepted = inspect.signature(ATTACKS[name]).parameters
    settings: dict[str, Any] = {key: budget for key in BUDGET if key in accepted} | WAITS[name][2]
    if "generator" in accepted:
        settings["generator"] = ImageGenerators.of(1, torch.arange(len(x), device=x.device))
    if name == "transfer":
        settings["surrogates"] = [model]
    if name == "feature_space":
        settings["features"] = lambda images: (model(images), images.square())
    with counting() as counts:
        x_adv = ATTACKS[name](model, x, y, epsilon=EPSILON, **settings)
    return x_adv, counts


@pytest.mark.parametrize("name", WAITS)
def test_waits_do_not_grow_with_the_steps_and_nothing_is_copied(device: torch.device, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(device)
    x, y = images(model, device)
    few, many = 2, 4  # below LOOK_EVERY
    x_adv, first = attack(name, model, x, y, few)
    _, second = attack(name, model, x, y, many)
    waits, kernels, _ = WAITS[name]
    assert first.waits.total() <= waits
    assert second.waits.total() == first.waits.total()
    assert not second.copies
    assert (second.kernels - first.kernels) / (many - few) <= kernels
    # The same adversarial images as on the CPU, from the same numbers: no step has a tie of this model's float32 sums.
    there = attack(name, model.to("cpu"), x.cpu(), y.cpu(), few)[0]
    torch.testing.assert_close(x_adv.cpu(), there, atol=1e-5, rtol=0)


def test_every_attack_is_in_the_table() -> None:
    assert set(WAITS) == set(ATTACKS)


def test_a_quantized_network(device: torch.device) -> None:
    model = tiny.network(1).to(device).eval()
    x, y = images(model, device)
    x_adv, counts = attack("apgd", model, x, y, 2)
    assert x_adv.device == device
    assert not counts.copies
