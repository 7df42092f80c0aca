"""The learning rate at points where its closed form is known without a calculator."""

from __future__ import annotations

import math
from typing import Any

import pytest

from robustq.hardening.optimization import learning_rate
from robustq.recipe import Recipe


def recipe(**keys: Any) -> Recipe:
    return Recipe(name="test", method="natural", epochs=keys.pop("epochs", 10), batch_size=4, lr=0.4, **keys)


@pytest.mark.parametrize(
    ("epochs_done", "share"),
    [(0, 1.0), (2.5, (1 + math.sqrt(0.5)) / 2), (10 / 3, 0.75), (5, 0.5), (20 / 3, 0.25), (10, 0.0), (11, 0.0)],
)
def test_cosine(epochs_done: float, share: float) -> None:
    assert learning_rate(recipe(), epochs_done) == pytest.approx(0.4 * share, abs=1e-15)


@pytest.mark.parametrize(
    ("epochs_done", "share"), [(0, 0.0), (0.5, 0.25), (1, 0.5), (1.5, 0.75), (2, 1.0), (6, 0.5), (10, 0.0)]
)
def test_cosine_after_warmup(epochs_done: float, share: float) -> None:
    assert learning_rate(recipe(warmup_epochs=2), epochs_done) == pytest.approx(0.4 * share, abs=1e-15)


def test_warmup_may_be_a_part_of_an_epoch() -> None:
    assert learning_rate(recipe(warmup_epochs=0.5), 0.25) == pytest.approx(0.2, abs=1e-15)
    assert learning_rate(recipe(warmup_epochs=0.5), 0.5) == pytest.approx(0.4, abs=1e-15)


@pytest.mark.parametrize(
    ("epochs_done", "lr"),
    [(0, 0.4), (49.999, 0.4), (50, 0.04), (99.999, 0.04), (100, 0.004), (150, 0.004)],
)
def test_steps(epochs_done: float, lr: float) -> None:
    # The tables' schedule of ODG-Q: 150 epochs, a tenth after 50 and after 100.
    settings = recipe(epochs=150, schedule="steps", milestones=(50, 100))
    assert learning_rate(settings, epochs_done) == pytest.approx(lr, rel=1e-15)


def test_steps_after_warmup() -> None:
    settings = recipe(epochs=30, schedule="steps", milestones=(10, 20), warmup_epochs=4)
    assert [learning_rate(settings, done) for done in (1, 4, 10, 20)] == pytest.approx([0.1, 0.4, 0.04, 0.004])


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_warmup_as_long_as_the_run(schedule: str) -> None:
    settings = recipe(epochs=2, warmup_epochs=2, schedule=schedule)
    assert learning_rate(settings, 1) == pytest.approx(0.2)
    assert math.isfinite(learning_rate(settings, 2))
