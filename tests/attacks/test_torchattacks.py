"""FGSM, BIM, PGD and TPGD give the images of torchattacks (3.5.1), an independent implementation.

The two that start at random are handed the same start. All is float64, where the last bit of a gradient decides no
sign.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robustq.attacks import bim, fgsm, pgd, tpgd
from robustq.data import to_float
from tests.models.small_nets import digits, small_spec, trained

EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 20


@functools.cache
def target() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A trained float network, 30 digits, their labels, and a start in the ball around each."""
    images, y = digits()
    x = to_float(images)[:30].double()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (x + (EPSILON * (2 * noise - 1)).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return trained(small_spec(32)).double(), x, y[:30], start


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    _, x, _, _ = target()
    # The project's promise is 1e-6; both are sums of the same few numbers.
    assert float((ours - theirs).abs().max()) <= 1e-6
    assert float((ours - x).abs().max()) >= 0.9 * EPSILON


def test_fgsm() -> None:
    model, x, y, _ = target()
    assert_same(fgsm(model, x, y, epsilon=EPSILON), torchattacks.FGSM(model, eps=EPSILON)(x, y))


def test_bim() -> None:
    model, x, y, _ = target()
    theirs = torchattacks.BIM(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x, y)
    assert_same(bim(model, x, y, epsilon=EPSILON, step_size=STEP, steps=STEPS), theirs)


def test_pgd_from_the_image_itself() -> None:
    model, x, y, _ = target()
    theirs = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=False)(x, y)
    assert_same(pgd(model, x, y, epsilon=EPSILON, step_size=STEP, steps=STEPS, random_start=False), theirs)


class Handed:
    """Stands for the noise that torchattacks draws: whatever it asks for, it gets the start's."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform_(self, low: float, high: float) -> Tensor:
        assert (low, high) == (-EPSILON, EPSILON)
        return self.noise


def test_pgd_from_the_same_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, start = target()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", lambda images: Handed(start - images))
        theirs = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=True)(x, y)
    monkeypatch.setattr(importlib.import_module("robustq.attacks.pgd"), "uniform_start", lambda *args, **more: start)
    ours = pgd(model, x, y, epsilon=EPSILON, step_size=STEP, steps=STEPS)
    assert_same(ours, theirs)
    # The start matters, so that its being the same was tested.
    straight = pgd(model, x, y, epsilon=EPSILON, step_size=STEP, steps=STEPS, random_start=False)
    assert float((straight - ours).abs().max()) > 1e-3


def test_tpgd_from_the_same_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, start = target()

    def same(images: Tensor) -> Tensor:
        return (start - images) / 0.001  # TRADES' factor, which torchattacks multiplies it by

    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn_like", same)
        theirs = torchattacks.TPGD(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x)
    monkeypatch.setattr(importlib.import_module("robustq.attacks.pgd"), "uniform_start", lambda *args, **more: start)
    assert_same(tpgd(model, x, y, epsilon=EPSILON, step_size=STEP, steps=STEPS), theirs)
