"""The trainer loop: the arithmetic of a run against a loop written out, its bookkeeping, and how it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import Augment, Batch, TensorSplit
from robustq.hardening.methods.method import Method, Stateless, Step
from robustq.hardening.methods.natural import Natural
from robustq.hardening.methods.registry import build_method
from robustq.hardening.metrics import MACHINE_KEYS
from robustq.hardening.monitor import Inspection, Monitor, HoldoutAccuracy
from robustq.hardening.optimization import build_optimizer
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Trained, Training
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import Recipe
from tests.hardening.memory_checkpointer import MemoryCheckpointer

CPU = torch.device("cpu")
EPSILON = 0.1
IMAGES, BATCH = 40, 16  # batches of 16, 16 and 8


def spec(bits: int) -> ModelSpec:
    return ModelSpec("resnet8", bits, bits, 10, 1, 8, "digits", EPSILON, tuple("0123456789"))


def network(bits: int = 32) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(spec(bits))
    calibrate(model, split().images.float() / 255, from_scratch=True)
    # As training lays it out: sums in another order differ in their last bits.
    return model.to(memory_format=torch.channels_last)


def split(seed: int = 5) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(0, 10, (IMAGES,), generator=generator))


def recipe(**keys: Any) -> Recipe:
    values: dict[str, Any] = {"method": "natural", "epochs": 2, "batch_size": BATCH, "lr": 0.1}
    return Recipe(name="test", **{**values, **keys})


class Scripted:
    """A monitor that has its answers ready."""

    images = 500
    chance = 0.1

    def __init__(self, *answers: HoldoutAccuracy) -> None:
        self._answers = list(answers)
        self.weights: list[Tensor] = []

    def watch(self, model: nn.Module) -> HoldoutAccuracy:
        self.weights.append(model.get_parameter("fc.weight").detach().clone())
        return self._answers.pop(0) if self._answers else HoldoutAccuracy(0.5, None)

    def inspect(self, model: nn.Module, *, batch_size: int) -> Inspection:
        return Inspection(1.0, 2.0, 3.0, 0.25)


def run(
    model: nn.Module,
    settings: Recipe,
    *,
    method: Method | None = None,
    monitor: Monitor | Scripted | None = None,
    seed: int = 7,
    augment: Augment | None = None,
    on_epoch: Callable[[dict[str, Any], bool], None] | None = None,
) -> tuple[Trained, list[dict[str, Any]], list[bool]]:
    """Train; also the metrics rows and which epochs were the best so far."""

    def note(state: dict[str, Any], epoch_ended: bool, is_best: bool) -> None:
        if epoch_ended and on_epoch is not None:
            on_epoch(state["standing"]["rows"][-1], is_best)

    keeper = MemoryCheckpointer(note)
    training = Training(
        model,
        method or Natural(model),
        split(),
        cast(Monitor, monitor or Scripted()),
        settings,
        augment=augment or Augment(),
        seed=seed,
        device=CPU,
    )
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    trained = training.run(keeper, StopRequest())
    return trained, training.state.rows, [is_best for *_, epoch_ended, is_best in keeper.saved if epoch_ended]


def by_hand(model: nn.Module, settings: Recipe, rates: list[float], *, seed: int, augment: Augment) -> list[float]:
    """Natural training with SGD spelled out (momentum buffer v <- 0.9 v + g + decay w, w <- w - lr v); the losses."""
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
        loss = functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
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
    (
        {"epochs": 3, "schedule": "steps", "milestones": (2,), "warmup_epochs": 1},
        [0.1 / 3, 0.2 / 3] + [0.1] * 4 + [0.01] * 3,
    ),
]


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize(("keys", "rates"), RATES)
def test_natural_training_is_plain_sgd(bits: int, keys: dict[str, Any], rates: list[float]) -> None:
    settings = recipe(weight_decay=0.01, momentum=0.8, **keys)
    augment = Augment(crop_padding=1, flip=True)
    model, twin = network(bits), network(bits)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    _, rows, _ = run(model, settings, augment=augment)
    losses = by_hand(twin, settings, rates, seed=7, augment=augment)
    state = twin.state_dict()
    for name, value in model.state_dict().items():
        # The same float32 operations in the same order: exact.
        assert torch.equal(value, state[name]), name
    moved = max((value - start[name]).abs().max().item() for name, value in state.items() if "weight" in name)
    assert moved > 0.05
    assert not model.training
    # The rows' loss is the mean over images, the short batch of 8 counting half.
    for epoch, row in enumerate(rows):
        first, second, short = losses[3 * epoch : 3 * epoch + 3]
        assert row["loss"] == pytest.approx((16 * first + 16 * second + 8 * short) / 40, rel=1e-4)
        assert row["lr"] == pytest.approx(rates[3 * epoch + 2], rel=1e-6)


class Constant(Stateless):
    """A method whose loss has a zero gradient everywhere, so that only weight decay moves anything."""

    passes = "1 forward + 1 backward pass"
    adversarial = False

    def __init__(self, model: nn.Module, losses: tuple[float, ...] = ()) -> None:
        self.model = model
        self.losses = losses
        self.epochs: list[int] = []

    def begin_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        return x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        logits = self.model(x_adv)
        value = self.losses[self.epochs[-1]] if self.losses else 1.0
        # Times the weights and not times the logits: every parameter then has a gradient, and it is 0.
        loss = 0.0 * torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum() + value
        return Step(loss, {"constant": torch.tensor(2.0 * value)}, functional.one_hot(y, 10).to(logits))


def test_weight_decay_spares_the_learned_thresholds() -> None:
    model = network(4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = recipe(epochs=1, momentum=0.0, weight_decay=0.5, schedule="steps")
    run(model, settings, method=Constant(model))
    thresholds = [name for name in before if name.endswith("log_threshold")]
    assert len(thresholds) == len(learned_thresholds(model)) > 5
    for name, value in model.named_parameters():
        # Three steps of lr * decay = 0.05; float32 rounds three times.
        shrunk = before[name] if name in thresholds else before[name] * 0.95**3
        torch.testing.assert_close(value.detach(), shrunk, rtol=0 if name in thresholds else 1e-6, atol=0)
    assert any(before[name] != 0 for name in thresholds)


@pytest.mark.parametrize("bits", [32, 4])
def test_every_parameter_is_trained_once(bits: int) -> None:
    model = network(bits)
    grouped = [
        id(parameter) for group in build_optimizer(model, recipe()).param_groups for parameter in group["params"]
    ]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def hardened(seed: int, *, ambient: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and rows of a short ODG-Q run; `ambient` seeds torch's global generator, which should not matter."""
    model = network(4)
    settings = recipe(method="odgq", settings={"domains": 2})
    method = build_method(
        settings, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=seed
    )
    x = split(6).images[:8].float() / 255
    monitor = Monitor(x, split(6).labels[:8], epsilon=EPSILON, batch_size=100, seed=seed)
    torch.manual_seed(ambient)
    _, rows, _ = run(model, settings, method=method, monitor=monitor, seed=seed, augment=Augment(1, True))
    return model.state_dict(), rows


def test_the_seed_settles_everything() -> None:
    first, first_rows = hardened(1)
    again, again_rows = hardened(1, ambient=99)
    other, _ = hardened(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    timeless = [
        [{key: value for key, value in row.items() if key not in MACHINE_KEYS} for row in rows]
        for rows in (first_rows, again_rows)
    ]
    assert timeless[0] == timeless[1]


def test_the_seed_settles_natural_training() -> None:
    states = []
    for ambient, seed in ((1, 7), (2, 7), (1, 8)):
        model = network()
        torch.manual_seed(ambient)
        run(model, recipe(), seed=seed, augment=Augment(1, True))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


KEYS = {
    "epoch",
    "loss",
    "cross_entropy",
    "train_accuracy",
    "holdout_clean_accuracy",
    "holdout_pgd10_accuracy",
    "feature_norm",
    "logit_margin",
    "input_gradient_norm",
    "zero_gradients",
    "lr",
    "seconds",
    "images_per_second",
    "loading_share",
    "peak_memory_bytes",
    "peak_memory_of",
}


def test_metrics_rows() -> None:
    _, rows = hardened(1)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == KEYS | {"mmd"}
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 3 * row["mmd"], rel=1e-6)
        for key in ("train_accuracy", "holdout_clean_accuracy", "holdout_pgd10_accuracy"):
            assert 0 <= row[key] <= 1
        assert row["holdout_pgd10_accuracy"] <= row["holdout_clean_accuracy"]
        json.dumps(row, allow_nan=False)
    model = network()
    _, rows, _ = run(model, recipe(epochs=1), monitor=Scripted(HoldoutAccuracy(0.7, None)))
    assert set(rows[0]) == KEYS
    assert (rows[0]["holdout_clean_accuracy"], rows[0]["holdout_pgd10_accuracy"]) == (0.7, None)


def test_rows_count_the_methods_terms_and_its_logits() -> None:
    model = network()
    _, rows, _ = run(model, recipe(), method=Constant(model, losses=(1.5, 0.5)))
    assert [(row["loss"], row["constant"], row["train_accuracy"]) for row in rows] == [(1.5, 3.0, 1.0), (0.5, 1.0, 1.0)]


def test_the_method_hears_of_each_epoch_once_before_it() -> None:
    model = network()
    method = Constant(model)
    run(model, recipe(epochs=3), method=method)
    assert method.epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("answers", "flags", "best"),
    [
        # Robust accuracy decides where it is watched, clean accuracy on ties; of equal epochs the later one.
        ([(0.5, 0.1), (0.4, 0.3), (0.9, 0.2)], [True, True, False], 2),
        ([(0.5, 0.3), (0.4, 0.3), (0.6, 0.3)], [True, False, True], 3),
        ([(0.5, 0.3), (0.5, 0.3), (0.5, 0.1)], [True, True, False], 2),
        ([(0.8, None), (0.7, None), (0.6, None)], [True, False, False], 1),
        ([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], [True, True, True], 3),
    ],
)
def test_the_monitor_chooses_the_best_epoch(answers: list[Any], flags: list[bool], best: int) -> None:
    model = network()
    monitor = Scripted(*[HoldoutAccuracy(*answer) for answer in answers])
    at_call: list[Tensor] = []

    def on_epoch(row: dict[str, Any], is_best: bool) -> None:
        at_call.append(model.get_parameter("fc.weight").detach().clone())

    trained, _, got = run(model, recipe(epochs=3), monitor=monitor, on_epoch=on_epoch)
    assert got == flags
    assert trained.best_epoch == best and trained.best == HoldoutAccuracy(*answers[best - 1])
    # What is saved in on_epoch is what was watched, and the run ends on the last epoch's weights.
    assert all(torch.equal(saved, watched) for saved, watched in zip(at_call, monitor.weights, strict=True))
    assert torch.equal(model.get_parameter("fc.weight"), at_call[-1])


class Repeating(Natural):
    """Natural training that takes several steps on each batch, and looks at the images' gradient after each."""

    repeats = 3

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.told: list[tuple[Tensor, Tensor]] = []
        self._perturbed: list[Tensor] = []

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        self._perturbed.append(x.clone().requires_grad_())
        return self._perturbed[-1]

    def after_backward(self, x_adv: Tensor) -> None:
        assert x_adv is self._perturbed[-1] and x_adv.grad is not None
        self.told.append((self.model.get_parameter("fc.weight").detach().clone(), x_adv.grad))


def test_a_method_that_repeats_takes_so_many_steps_on_each_batch() -> None:
    model, twin = network(), network()
    method = Repeating(model)
    _, rows, _ = run(model, recipe(epochs=1), method=method)
    settings = recipe()
    optimizer = build_optimizer(twin, settings)
    twin.train()
    losses, seen = [], iter(method.told)
    for step, (x, y) in enumerate(split().batches(BATCH, device=CPU, seed=7, epoch=0, augment=Augment())):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step / 3)  # the schedule counts batches, not their repeats
        for _ in range(3):
            images = x.clone().requires_grad_()
            loss = functional.cross_entropy(twin(images), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            weight, gradient = next(seen)
            # Told before the optimiser's step, with the gradient of this very loss.
            assert torch.equal(weight, twin.get_parameter("fc.weight"))
            assert images.grad is not None and torch.equal(gradient, images.grad)
            optimizer.step()
            losses.append(loss.item() * len(y))
    assert next(seen, None) is None
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # Every repeat counts in the row: three times forty images, in float32.
    assert rows[0]["loss"] == pytest.approx(sum(losses) / 120, rel=1e-5)


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_images_go_through_the_network_with_channels_beside_each_other(bits: int) -> None:
    gray = split()
    images = gray.images.expand(-1, 3, -1, -1)  # of one channel, a tensor has no such order
    torch.manual_seed(0)
    model = build_model(replace(spec(bits), channels=3))
    calibrate(model, images.float() / 255, from_scratch=True)
    training = Training(
        model,
        Natural(model),
        TensorSplit(images, gray.labels),
        cast(Monitor, Scripted()),
        recipe(epochs=1),
        augment=Augment(),
        seed=7,
        device=CPU,
    )
    seen, apart = [], []

    def look(_: nn.Module, __: tuple[Any, ...], output: Any, *, name: str) -> None:
        seen.append(name)
        if not getattr(output, "value", output).is_contiguous(memory_format=torch.channels_last):
            apart.append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) or name.endswith(("branch", "sign1", "relu1")):
            module.register_forward_hook(partial(look, name=name))
    training.take_step(next(training.epoch_batches()))
    assert len(seen) > 20 and not apart


def test_the_share_of_time_that_batches_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("robustq.hardening.trainer.time.perf_counter", lambda: now[0])

    class Slow(TensorSplit):
        def batches(self, *arguments: Any, **keys: Any) -> Iterator[Batch]:
            for batch in super().batches(*arguments, **keys):
                now[0] += 3.0
                yield batch

    class Working(Natural):
        def loss(self, *arguments: Tensor) -> Step:
            now[0] += 1.0
            return super().loss(*arguments)

    whole, model, keeper = split(), network(), MemoryCheckpointer()
    training = Training(
        model,
        Working(model),
        Slow(whole.images, whole.labels),
        cast(Monitor, Scripted()),
        recipe(),
        augment=Augment(),
        seed=7,
        device=CPU,
    )
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    training.run(keeper, StopRequest())
    assert [row["loading_share"] for row in training.state.rows] == [0.75] * len(training.state.rows)
    assert len(training.state.rows) > 1
