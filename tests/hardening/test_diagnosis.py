"""NaN and Inf: recognised, and traced to step and layer."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.data import Batch, TensorSplit
from robustq.errors import NotFiniteError
from robustq.hardening import optimization, trainer
from robustq.hardening.methods.method import LossOutput
from robustq.hardening.methods.natural import Natural
from robustq.hardening.state import StopRequest
from robustq.models.compiled import CompiledForward
from tests.hardening.tiny import MemoryCheckpointer, begin, natural, recipe, training

IMAGES, BATCH = 40, 8  # five steps an epoch


class Marked(nn.Module):
    """Passes images on, but answers a batch that holds a white pixel with Inf: it breaks at one known step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.amax() == 1.0, x * math.inf, x)


def network(first: nn.Module, features: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=first, flat=nn.Flatten(), fc=nn.Linear(features, 3)))


class Split(TensorSplit):
    """Grey images; the batch of one step, counted from 1 over all epochs, gets a pixel of another value."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(torch.full((IMAGES, 1, 4, 4), 100, dtype=torch.uint8), torch.arange(IMAGES) % 3)
        self.step, self.value = step, value

    def batches(self, batch_size: int, **keys: Any) -> Any:
        first = keys["epoch"] * (IMAGES // BATCH) + keys["skip"] + 1
        for number, batch in enumerate(super().batches(batch_size, **keys), start=first):
            x = batch.x.clone()
            if number == self.step:
                x[3, 0, 2, 2] = self.value
            yield Batch(x, batch.y, batch.indices)


class Faulty(Natural):
    """Natural training, but the step whose images hold a white pixel fails in the way of its `fault`."""

    fault = ""

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        return x / 0.0 if self.fault == "images" and bool((x == 1.0).any()) else x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        output = super().loss(x, x_adv, y, indices)
        loss, now = output.loss, bool((x == 1.0).any())
        if now and self.fault == "loss":
            loss = loss * math.inf
        if now and self.fault == "weights":
            # sqrt has an infinite slope at 0: the loss stays what it is, its gradient is NaN.
            loss = loss + sum((0.0 * parameter).square().sum().sqrt() for parameter in self.model.parameters())
        return LossOutput(loss, {}, output.logits)


def run(model: nn.Module, split: TensorSplit, *, fault: str = "", **keys: Any) -> tuple[str, MemoryCheckpointer]:
    method = natural(model, Faulty)
    method.fault = fault
    settings = recipe(**{"epochs": 3, "batch_size": BATCH, "lr": 0.01, **keys})
    running = training(model, settings, method=method, data=split, seed=0)
    checkpointer = begin(running)
    with pytest.raises(NotFiniteError) as stopped:
        running.run(checkpointer, StopRequest())
    return str(stopped.value), checkpointer


def finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(finite(part) for part in value.values())
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("check_every", [1, 20])
@pytest.mark.parametrize(
    ("pixel", "fault", "words"),
    [
        (1.0, "loss", "the loss became inf in step 3 of epoch 2; every layer's output was finite"),
        (1.0, "weights", "first.weight became NaN or Inf in the update of step 3 of epoch 2"),
        (1.0, "images", "the adversarial images became NaN or Inf in step 3 of epoch 2"),
        (math.nan, "", "an image of step 3 of epoch 2 is NaN or Inf"),
    ],
)
def test_step_and_place_are_named(
    pixel: float, fault: str, words: str, check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECK_EVERY", check_every)
    message, checkpointer = run(network(nn.Conv2d(1, 2, 1), 32), Split(8, pixel), fault=fault)
    assert message.startswith(words), message
    assert "what was saved before remains" in message
    # The first epoch was saved, nothing of the second.
    assert checkpointer.saved == [(0, 0, False, False), (1, 0, True, True)]
    assert finite(checkpointer.load())


@pytest.mark.parametrize("compiling", [False, True])
def test_the_first_layer_is_named(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "CompiledForward", functools.partial(CompiledForward, backend="eager"))
    message, _ = run(network(Marked(), 16), Split(8, 1.0), compile=compiling)
    assert message.startswith("the output of first became NaN or Inf in step 3 of epoch 2"), message


def test_a_fault_that_does_not_repeat_is_reported_as_such() -> None:
    class Once(Split):
        def batches(self, batch_size: int, **keys: Any) -> Any:
            for batch in super().batches(batch_size, **keys):
                if bool((batch.x == 1.0).any()):
                    self.step = 0
                yield batch

    message, _ = run(network(Marked(), 16), Once(8, 1.0))
    assert message.startswith("loss or weights became NaN or Inf between steps 1 and 5 of epoch 2, not when repeated")
