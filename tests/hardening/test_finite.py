"""NaN and Inf stop a run, with the step and the first layer named, and never reach a saved state."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import Augment, Batch, TensorSplit
from robustq.errors import NotFiniteError
from robustq.hardening import optimization as descent
from robustq.hardening import trainer
from robustq.hardening.diagnosis import FiniteWatch, watching_layers
from robustq.hardening.methods.method import Method, Stateless, Step
from robustq.hardening.monitor import Inspection, Monitor, Watched
from robustq.hardening.precision import CompiledForward
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import Recipe
from tests.hardening.memory_keeper import MemoryKeeper

CPU = torch.device("cpu")
IMAGES, BATCH = 40, 8  # five steps an epoch


class Marked(nn.Module):
    """Lets images pass, but answers a batch that holds a white pixel with Inf: it breaks at one known step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.amax() == 1.0, x * math.inf, x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(first=nn.Conv2d(1, 2, 1), brittle=Marked(), flat=nn.Flatten(), fc=nn.Linear(2 * 16, 3))
    )


class Pixels(nn.Module):
    """The network behind a layer that sees the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.brittle = Marked()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(self.brittle(x))
        return logits


class Split(TensorSplit):
    """Images of mid grey; the batch of one step, counted from 1 over all epochs, gets a pixel of another value."""

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


class Faulty(Stateless):
    """Cross-entropy, but the step whose images hold a white pixel goes wrong in the way of its `fault`."""

    passes = "1 forward + 1 backward pass"
    adversarial = False

    def __init__(self, model: nn.Module, fault: str) -> None:
        self.model, self.fault = model, fault

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        return x / 0.0 if self.fault == "images" and bool((x == 1.0).any()) else x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        now = bool((x == 1.0).any())
        logits = self.model(x_adv)
        loss = functional.cross_entropy(logits, y)
        if now and self.fault == "loss":
            loss = loss * math.inf
        if now and self.fault == "weights":
            # sqrt has an infinite slope at 0: the loss stays what it is, its gradient is NaN.
            loss = loss + sum((0.0 * parameter).square().sum().sqrt() for parameter in self.model.parameters())
        return Step(loss, {}, logits.detach())


class Calm:
    chance = 0.1
    images = 8

    def watch(self, model: nn.Module) -> Watched:
        return Watched(0.5, None)

    def inspect(self, model: nn.Module, *, batch_size: int) -> Inspection:
        return Inspection(feature_norm=None, logit_margin=0.0, input_gradient_norm=0.0, zero_gradients=0.0)


def run(
    model: nn.Module, split: Split, *, fault: str = "", epochs: int = 3, compiling: bool = False
) -> tuple[str, MemoryKeeper]:
    recipe = Recipe(name="test", method="natural", epochs=epochs, batch_size=BATCH, lr=0.01, compile=compiling)
    training = Training(
        model,
        cast(Method, Faulty(model, fault)),
        split,
        cast(Monitor, Calm()),
        recipe,
        augment=Augment(),
        seed=0,
        device=CPU,
    )
    keeper = MemoryKeeper()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    with pytest.raises(NotFiniteError) as stopped:
        training.run(keeper, StopRequest())
    return str(stopped.value), keeper


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
        (-math.inf, "", "an image of step 3 of epoch 2 is NaN or Inf"),
    ],
)
def test_step_and_place_are_named(
    pixel: float, fault: str, words: str, check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECK_EVERY", check_every)
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(1, 2, 1), flat=nn.Flatten(), fc=nn.Linear(2 * 16, 3)))
    message, keeper = run(model, Split(8, pixel), fault=fault)
    assert message.startswith(words), message
    assert "what was saved before stands" in message
    # The first epoch was saved, nothing of the second.
    assert keeper.saved == [(0, 0, False, False), (1, 0, True, True)]
    assert finite(keeper.load())


@pytest.mark.parametrize("compiling", [False, True])
def test_the_first_layer_is_named(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = functools.partial(CompiledForward, backend="eager")
    monkeypatch.setattr(descent, "CompiledForward", compiled)
    message, _ = run(Pixels(), Split(8, 1.0), compiling=compiling)
    assert message.startswith("the output of brittle became NaN or Inf in step 3 of epoch 2"), message


def test_a_state_between_epochs_is_where_the_repetition_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    message, keeper = run(Pixels(), Split(8, 1.0))
    assert message.startswith("the output of brittle became NaN or Inf in step 3 of epoch 2"), message
    assert keeper.saved[-1][:2] == (1, 2)  # every batch is saved here, and the broken one was not
    assert finite(keeper.load())


def test_a_fault_that_does_not_come_back_is_told_as_such() -> None:
    class Once(Split):
        def batches(self, batch_size: int, **keys: Any) -> Any:
            for batch in super().batches(batch_size, **keys):
                if bool((batch.x == 1.0).any()):
                    self.step = 0
                yield batch

    message, _ = run(Pixels(), Once(8, 1.0))
    assert message.startswith("loss or weights became NaN or Inf between steps 1 and 5 of epoch 2, not when repeated")


def test_too_high_a_learning_rate_names_a_layer_of_a_quantized_network() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSpec("resnet8", 4, 4, 3, 1, 4, "digits", 0.1, tuple("012")))
    recipe = Recipe(name="test", method="natural", epochs=3, batch_size=BATCH, lr=1e38, warmup_epochs=0)
    split = TensorSplit(
        torch.randint(0, 256, (IMAGES, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        torch.arange(IMAGES) % 3,
    )
    training = Training(
        model,
        cast(Method, Faulty(model, "")),
        split,
        cast(Monitor, Calm()),
        recipe,
        augment=Augment(),
        seed=0,
        device=CPU,
    )
    keeper = MemoryKeeper()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    with pytest.raises(NotFiniteError, match=r"in (the update of )?step \d of epoch 1") as stopped:
        training.run(keeper, StopRequest())
    named = str(stopped.value).removeprefix("the output of ").split()[0]
    layers = {name for name, _ in model.named_modules()} | set(model.state_dict())
    assert named in layers, stopped.value
    assert "tensor_quant" not in named  # a layer by the name that people know


def test_the_watch_sees_weights_and_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    watch = FiniteWatch(CPU)
    x, loss = torch.zeros(2, 1, 2, 2), torch.tensor(1.0)
    watch.add(x, loss)
    assert watch.fine(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            kept = value.clone()
            value.fill_(math.nan)
            assert not watch.fine(model), name
            value.copy_(kept)
    assert watch.fine(model)
    watch.add(x, loss * math.inf)
    watch.add(x, loss)
    assert not watch.fine(model)  # one broken batch is not forgotten


def test_watching_changes_nothing() -> None:
    model = network()
    x = torch.rand(2, 1, 4, 4)
    before = model(x)
    with watching_layers(model) as broken:
        assert torch.equal(model(x), before)
    assert broken == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
