"""When training counts as collapsed, and that the trainer then stops with the best weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from robustq.hardening.monitor import Collapse, Monitor, HoldoutAccuracy, find_collapse
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from tests.hardening.memory_checkpointer import MemoryCheckpointer
from tests.hardening.test_resume import begun


@pytest.mark.parametrize(
    ("robust", "images", "collapsed"),
    [
        ([0.4, 0.02, 0.0], 500, True),
        ([0.4, 0.02], 500, False),  # one bad epoch is not two
        ([0.4, 0.02, 0.3], 500, False),  # it came back
        ([0.4, 0.02, 0.3, 0.02, 0.01], 500, True),
        ([0.4, 0.19, 0.19], 500, True),
        ([0.4, 0.21, 0.21], 500, False),  # overfitting, but not below half
        ([0.4, 0.19, 0.21], 500, False),
        ([0.06, 0.02, 0.02], 100, False),  # a third, but as likely chance: Wilson [2.8, 12.5] and [0.6, 7.0]
        ([0.06, 0.02, 0.02], 2000, True),
        ([0.02, 0.001, 0.001], 2000, False),  # one class for all images, of 50 classes; then it learns
        ([0.026, 0.001, 0.001], 2000, False),  # not surely more: Wilson from 1.99%
        ([0.027, 0.001, 0.001], 2000, True),  # from 2.08%
        ([0.0, 0.0, 0.0], 500, False),  # never was robust
        ([0.1, 0.2, 0.3, 0.4], 500, False),
        ([0.4, 0.5, 0.5, 0.0, 0.0], 500, True),
        ([None, None, None], 500, False),  # natural training
        ([], 500, False),
        ([0.0], 500, False),
    ],
)
def test_a_collapse_is_a_fall_that_lasts_and_is_no_chance(
    robust: list[float | None], images: int, collapsed: bool
) -> None:
    found = find_collapse(robust, images=images, chance=0.02, planned=40)
    assert (found is not None) == collapsed


def test_the_message_says_what_happened_and_what_to_do() -> None:
    found = find_collapse([0.4, 0.5, 0.5, 0.02, 0.01], images=500, chance=0.1, planned=40)
    assert found == Collapse(epoch=5, robust=0.01, best_epoch=3, best=0.5, planned=40)
    told = str(found)
    for part in ("PGD-10 1.0%", "epoch 5, 50.0% in epoch 3", "stopped after 5 of 40", "--set stop_on_collapse=false"):
        assert part in told
    assert "\n" not in told


class Falling(Monitor):
    """The accuracies of a run that falls in its third epoch."""

    answers = (0.5, 0.6, 0.0, 0.0, 0.0, 0.0)
    images = 500
    chance = 0.1

    def __init__(self, inner: Monitor) -> None:
        self.__dict__.update(inner.__dict__)
        self.seen = 0

    def watch(self, model: nn.Module) -> HoldoutAccuracy:
        self.seen += 1
        return HoldoutAccuracy(0.9, self.answers[self.seen - 1])


def test_chance_is_the_most_frequent_class() -> None:
    labels = torch.tensor([3, 1, 3, 0, 3, 1])
    monitor = Monitor(torch.zeros(6, 1, 2, 2), labels, epsilon=None, batch_size=6, seed=0)
    assert (monitor.chance, monitor.images) == (0.5, 6)


def falling(**keys: Any) -> Training:
    training, _ = begun("odgq", 0, {"domains": 2}, init=0)
    training.recipe = replace(training.recipe, epochs=6, **keys)
    training.monitor = Falling(training.monitor)
    return training


def test_the_trainer_stops_and_best_is_the_epoch_before() -> None:
    training, keeper = falling(), MemoryCheckpointer()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    trained = training.run(keeper, StopRequest())
    assert trained.collapse == Collapse(4, 0.0, 2, 0.6, 6)
    assert (trained.best_epoch, trained.best) == (2, HoldoutAccuracy(0.9, 0.6))
    assert training.state.epoch == 4 and training.finished and not training.model.training
    assert trained.seconds_per_epoch == training.state.seconds / 4
    # A process that dies before result.json goes on with nothing but that.
    again = falling()
    again.load_state_dict(keeper.load())
    assert again.finished
    assert again.run(keeper, StopRequest()) == trained
    assert again.standing.epoch == 4


def test_it_can_be_told_not_to() -> None:
    training, keeper = falling(stop_on_collapse=False), MemoryCheckpointer()
    trained = training.run(keeper, StopRequest())
    assert (trained.collapse, trained.best_epoch, training.state.epoch) == (None, 2, 6)
