"""The training loop: the arithmetic of a run against a loop written out, and its bookkeeping."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import Augment
from robustq.hardening.averaging import IMAGES as REESTIMATED
from robustq.hardening.methods.natural import Natural
from robustq.hardening.monitor import HoldoutAccuracy
from robustq.hardening.optimization import build_optimizer
from robustq.hardening.state import StopRequest
from robustq.models.batch_norm import batch_statistics
from robustq.models.quant.quantizers import learned_thresholds
from robustq.recipe import Recipe
from tests.hardening.tiny import (
    BATCH,
    CPU,
    ScriptedMonitor,
    begin,
    finish,
    natural,
    network,
    recipe,
    same,
    split,
    training,
)


def by_hand(
    model: nn.Module, settings: Recipe, rates: list[float], *, seed: int, augment: Augment
) -> list[tuple[float, int]]:
    """Natural training with SGD spelled out (v <- 0.9 v + g + decay w, w <- w - lr v); losses and right answers."""
    thresholds = {id(module.log_threshold) for module in learned_thresholds(model).values()}
    velocity: dict[str, Tensor] = {}
    losses = []
    model.train()
    batches = [
        batch
        for epoch in range(settings.epochs)
        for batch in split().batches(BATCH, device=CPU, seed=seed, epoch=epoch, augment=augment)
    ]
    for (x, y), lr in zip(batches, rates, strict=True):
        model.zero_grad()
        logits = model(x)
        loss = functional.cross_entropy(logits, y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append((loss.item(), int((logits.argmax(dim=1) == y).sum())))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                decay = 0.0 if id(parameter) in thresholds else settings.weight_decay
                pull = parameter.grad.add(parameter, alpha=decay)
                velocity[name] = (settings.momentum * velocity[name]).add(pull) if name in velocity else pull
                parameter.add_(velocity[name], alpha=-lr)
    return losses


def cosine(share: float) -> float:
    return 0.1 * (1 + math.cos(math.pi * share)) / 2


# Six steps. With a warm-up of one epoch the first three climb to the peak, and neither end of the run stands still.
RATES: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [cosine(step / 6) for step in range(6)]),
    ({"warmup_epochs": 1}, [0.1 / 3, 0.2 / 3, 0.1, 0.1, cosine(1 / 3), cosine(2 / 3)]),
    ({"schedule": "steps", "milestones": (1,)}, [0.1] * 3 + [0.01] * 3),
]


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize(("keys", "rates"), RATES)
def test_natural_training_is_plain_sgd(bits: int, keys: dict[str, Any], rates: list[float]) -> None:
    settings = recipe(weight_decay=0.01, momentum=0.8, **keys)
    augment = Augment(crop_padding=1, flip=True)
    model, twin = network(bits), network(bits)
    start = model.get_parameter("conv1.weight").detach().clone()
    running = training(model, settings, augment=augment)
    finish(running)
    losses = by_hand(twin, settings, rates, seed=7, augment=augment)
    # The same float32 operations in the same order: exact.
    same(dict(model.state_dict()), dict(twin.state_dict()))
    assert (model.get_parameter("conv1.weight") - start).abs().max() > 0.05
    assert not model.training
    # The rows' loss is the mean over images, the short batch of 8 counting half.
    for epoch, row in enumerate(running.state.rows):
        (first, second, short), right = zip(*losses[3 * epoch : 3 * epoch + 3], strict=True)
        assert row["train_accuracy"] == pytest.approx(sum(right) / 40)
        assert row["loss"] == pytest.approx((16 * first + 16 * second + 8 * short) / 40, rel=1e-4)
        assert row["lr"] == pytest.approx(rates[3 * epoch + 2], rel=1e-6)


@pytest.mark.parametrize(
    ("answers", "flags", "best"),
    [
        # Robust accuracy decides where it is measured, clean accuracy on ties; of equal epochs the later one.
        ([(0.5, 0.1), (0.4, 0.3), (0.9, 0.2)], [True, True, False], 2),
        ([(0.5, 0.3), (0.4, 0.3), (0.6, 0.3)], [True, False, True], 3),
        ([(0.5, 0.3), (0.5, 0.3), (0.5, 0.1)], [True, True, False], 2),
        ([(0.8, None), (0.7, None), (0.6, None)], [True, False, False], 1),
    ],
)
def test_the_monitor_chooses_the_best_epoch(answers: list[Any], flags: list[bool], best: int) -> None:
    model = network()
    monitor = ScriptedMonitor(*[HoldoutAccuracy(*answer) for answer in answers])
    running = training(model, recipe(epochs=3), monitor=monitor)
    checkpointer = begin(running)
    running.run(checkpointer, StopRequest())
    assert [is_best for *_, epoch_ended, is_best in checkpointer.saved if epoch_ended] == flags
    assert running.state.best_epoch == best and running.state.best == HoldoutAccuracy(*answers[best - 1])
    # The best weights are those that were evaluated, and the run ends on the last epoch's.
    same(running.state.best_weights, monitor.weights[best - 1])
    same(dict(model.state_dict()), monitor.weights[-1])


class Repeating(Natural):
    """Natural training that takes several steps on each batch, and looks at the images' gradient after each."""

    repeats = 3

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        self.perturbed = x.clone().requires_grad_()
        return self.perturbed

    def after_backward(self, x_adv: Tensor) -> None:
        assert x_adv is self.perturbed and x_adv.grad is not None
        calls = vars(self).setdefault("calls", [])
        calls.append((self.model.get_parameter("fc.weight").detach().clone(), x_adv.grad))


def test_a_method_that_repeats_takes_so_many_steps_on_each_batch() -> None:
    model, twin = network(), network()
    method = natural(model, Repeating)
    running = training(model, recipe(epochs=1), method=method)
    finish(running)
    optimizer = build_optimizer(twin, recipe())
    twin.train()
    losses, calls = [], iter(method.calls)
    for step, (x, y) in enumerate(split().batches(BATCH, device=CPU, seed=7, epoch=0, augment=Augment())):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step / 3)  # the schedule counts batches, not their repeats
        for _ in range(3):
            images = x.clone().requires_grad_()
            loss = functional.cross_entropy(twin(images), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            weight, gradient = next(calls)
            # Called before the optimizer's step, with the gradient of this very loss.
            assert torch.equal(weight, twin.get_parameter("fc.weight"))
            assert images.grad is not None and torch.equal(gradient, images.grad)
            optimizer.step()
            losses.append(loss.item() * len(y))
    assert next(calls, None) is None
    same(dict(model.state_dict()), dict(twin.state_dict()))
    # Every repeat counts in the row: three times forty images, in float32.
    assert running.state.rows[0]["loss"] == pytest.approx(sum(losses) / 120, rel=1e-5)


def test_averaged_weights_are_evaluated_and_saved_without_changing_the_training() -> None:
    decay = 0.3
    model, twin = network(4), network(4)
    monitor = ScriptedMonitor(HoldoutAccuracy(0.5, None), HoldoutAccuracy(0.6, None))
    running = training(model, recipe(ema_decay=decay), monitor=monitor)
    state = finish(running).load()
    steps: list[dict[str, Tensor]] = []

    class Recording(Natural):
        def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
            steps.append({name: value.detach().clone() for name, value in twin.named_parameters()})
            return x

    finish(training(twin, recipe(), method=natural(twin, Recording)))
    steps.append({name: value.detach().clone() for name, value in twin.named_parameters()})
    same(dict(model.state_dict()), dict(twin.state_dict()))
    # The average over them, its first steps faster.
    average = {name: value.double() for name, value in steps[0].items()}
    for t, weights in enumerate(steps[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * value.double() for name, value in weights.items()}
        if t % 3 == 0:
            evaluated = monitor.weights[t // 3 - 1]
            for name, value in average.items():
                torch.testing.assert_close(evaluated[name].double(), value, rtol=1e-5, atol=1e-7)  # float32
    same(state["judged"], monitor.weights[1])
    same(state["standing"]["best_weights"], monitor.weights[1])
    same(dict(state["model"]), dict(model.state_dict()))
    assert state["average"]["steps"] == 6


@pytest.mark.parametrize("bits", [32, 4])
def test_batch_norm_of_averaged_weights_is_estimated_on_training_images(bits: int) -> None:
    monitor = ScriptedMonitor()
    finish(training(network(bits), recipe(ema_decay=0.5, epochs=1), monitor=monitor))
    (evaluated,) = monitor.weights
    twin = network(bits)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            value.copy_(evaluated[name])
    inputs: dict[str, list[Tensor]] = {}

    def look(_: nn.Module, entering: tuple[Any, ...], *, name: str) -> None:
        inputs.setdefault(name, []).append(getattr(entering[0], "value", entering[0]))

    norms = {name: module for name, module in twin.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in norms.items():
        module.register_forward_pre_hook(partial(look, name=name))
    batches = list(split().batches(BATCH, device=CPU, seed=7, epoch=0, augment=Augment()))
    assert len(split()) < REESTIMATED
    with batch_statistics(twin.train()), torch.no_grad():
        for batch in batches[:2]:  # the full ones
            twin(batch.x)
    assert len(norms) > 5
    for name in norms:
        means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs[name]]).mean(dim=0)
        variances = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs[name]]).mean(dim=0)
        torch.testing.assert_close(evaluated[f"{name}.running_mean"], means, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(evaluated[f"{name}.running_var"], variances, rtol=1e-4, atol=1e-6)
