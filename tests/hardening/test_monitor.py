"""The monitor against closed forms: PGD-10 on a linear model, inspection image by image, and when a run collapses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.hardening.monitor import Collapse, HoldoutAccuracy, Monitor, find_collapse, inspect_network
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from tests.hardening.tiny import ScriptedMonitor, begin, network, recipe, training

EPSILON = 0.05


class Linear(nn.Module):
    """Two classes with logits (-s, s), s = scale * the sum of the pixels over 1/2; it keeps the images of each call."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        s = self.scale * (x.flatten(1) - 0.5).sum(dim=1)
        return torch.stack([-s, s], dim=1)


def constant_images(levels: list[float], side: int) -> tuple[Tensor, Tensor]:
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, side, side).clone()
    return x, torch.ones(len(levels), dtype=torch.int64)


def graded() -> tuple[Tensor, Tensor]:
    """Images labelled 1. Below 1/2: wrong. Up to 1/2 + epsilon: right until attacked. Above: robust."""
    return constant_images([0.30, 0.47, 0.51, 0.53, 0.545, 0.56, 0.70, 0.90], 8)


def monitor(x: Tensor, y: Tensor, *, epsilon: float | None = EPSILON, batch_size: int = 100, seed: int = 0) -> Monitor:
    return Monitor(x, y, epsilon=epsilon, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracies_are_those_of_the_closed_form(batch_size: int) -> None:
    # PGD on a linear model reaches the corner of the ball that flips the three below 0.55, in ten steps of epsilon / 4.
    model = Linear()
    assert monitor(*graded(), batch_size=batch_size).evaluate(model) == HoldoutAccuracy(6 / 8, 3 / 8)
    assert batch_size < 100 or len(model.seen) == 12  # clean, ten steps, and the count


def test_without_a_radius_only_clean_accuracy_is_counted() -> None:
    model = Linear()
    assert monitor(*graded(), epsilon=None).evaluate(model) == HoldoutAccuracy(6 / 8, None)
    assert len(model.seen) == 1


def test_wrong_answers_and_nan_logits() -> None:
    x, y = graded()
    assert monitor(x, 0 * y, batch_size=3).evaluate(Linear()) == HoldoutAccuracy(2 / 8, 1 / 8)
    assert monitor(x[2:], 0 * y[2:], batch_size=3).evaluate(Linear()) == HoldoutAccuracy(0.0, 0.0)
    assert monitor(x, 0 * y, batch_size=3).evaluate(Linear(math.nan)) == HoldoutAccuracy(0.0, 0.0)


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(mode: bool) -> None:
    model = network(4).train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(6)
    watching = monitor(x, y, batch_size=5)
    watching.evaluate(model)
    first = watching.inspect(model, batch_size=2)
    assert watching.inspect(model, batch_size=2) == first
    # Running statistics: with those of the batch its other images would count.
    assert watching.inspect(model, batch_size=5).logit_margin == pytest.approx(first.logit_margin, rel=1e-4, abs=1e-5)
    assert all(module.training is mode for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_every_epoch_starts_from_the_same_point_and_another_seed_from_another() -> None:
    x, y = graded()
    same, other = monitor(x, y, seed=3), monitor(x, y, seed=4)
    starts = []
    for watching in (same, same, other):
        model = Linear()
        watching.evaluate(model)
        # Call 0 is the clean count; call 1 looks at the start, inside the ball and not at the images themselves.
        starts.append(model.seen[1])
        assert 0 < (model.seen[1] - x[2:]).abs().max() <= EPSILON + 1e-6
        # Each step is epsilon / 4 long: after the first, every pixel went down by it, or to the wall of the ball.
        want = torch.maximum(starts[-1] - EPSILON / 4, x[2:] - EPSILON)
        torch.testing.assert_close(model.seen[2], want, rtol=0, atol=1e-6)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_inspection_of_a_linear_model_is_its_closed_form() -> None:
    levels, scale = [0.25, 0.5, 0.75], 0.5
    found = inspect_network(Linear(scale), *constant_images(levels, 2))
    s = [scale * 4 * (level - 0.5) for level in levels]
    assert found.feature_norm is None  # no pooling, no features
    assert found.logit_margin == pytest.approx(sum(2 * value for value in s) / 3, abs=1e-6)
    # d CE / d s = -2 (1 - p), p the label's share; each of 4 pixels moves s by `scale`, so the norm doubles it.
    norms = [2 * (1 - 1 / (1 + math.exp(-2 * value))) * scale * 2 for value in s]
    assert found.input_gradient_norm == pytest.approx(sum(norms) / 3, rel=1e-5)  # float32
    assert found.zero_gradients == 0.0
    # At s = 800 the label's share is exactly 1 in float32; at s = -800 the loss is as steep as it can be.
    saturated = inspect_network(Linear(800.0), *constant_images([0.75, 0.25], 2))
    assert saturated.zero_gradients == 0.5
    assert saturated.input_gradient_norm == pytest.approx(2 * 800 * 2 / 2, rel=1e-6)


# Batches of one and of four may round differently in float32, and a quantizer makes a step of a difference on a tie: so
# the quantized network is compared in the same batches.
@pytest.mark.parametrize(("bits", "batch_size"), [(32, 4), (4, 1)])
def test_inspection_is_the_mean_of_single_images(bits: int, batch_size: int) -> None:
    model = network(bits).eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (9, 1, 8, 8), generator=generator) / 255
    y = torch.randint(0, 10, (9,), generator=generator)
    found = inspect_network(model, x, y, batch_size=batch_size)
    features, margins, norms = [], [], []
    pooled: list[Tensor] = []
    handle = model.get_submodule("avgpool").register_forward_hook(lambda _, __, out: pooled.append(out.flatten(1)))
    for image, label in zip(torch.split(x, 1), torch.split(y, 1), strict=True):
        image = image.clone().requires_grad_()
        logits = model(image)
        functional.cross_entropy(logits, label).backward()  # type: ignore[no-untyped-call]
        assert image.grad is not None
        norms.append(image.grad.norm().item())
        features.append(pooled[-1].norm().item())
        others = [value for k, value in enumerate(logits[0].tolist()) if k != int(label)]
        margins.append(logits[0, int(label)].item() - max(others))
    handle.remove()
    # float32 sums of a thousand terms in two orders
    assert found.feature_norm == pytest.approx(sum(features) / 9, rel=1e-4)
    assert found.logit_margin == pytest.approx(sum(margins) / 9, rel=1e-4, abs=1e-5)
    assert found.input_gradient_norm == pytest.approx(sum(norms) / 9, rel=1e-4)
    assert found.zero_gradients == sum(norm == 0 for norm in norms) / 9


@pytest.mark.parametrize(
    ("robust", "images", "collapsed"),
    [
        ([0.4, 0.02, 0.0], 500, True),
        ([0.4, 0.02, 0.3], 500, False),  # it came back
        ([0.4, 0.21, 0.21], 500, False),  # overfitting, but not below half
        ([0.06, 0.02, 0.02], 100, False),  # a third, but as likely chance: Wilson [2.8, 12.5] and [0.6, 7.0]
        ([0.06, 0.02, 0.02], 2000, True),
        ([0.026, 0.001, 0.001], 2000, False),  # not surely more than a constant answer: Wilson from 1.99%
        ([0.027, 0.001, 0.001], 2000, True),  # from 2.08%
        ([0.0, 0.0, 0.0], 500, False),  # never was robust
        ([None, None, None], 500, False),  # natural training
    ],
)
def test_a_collapse_is_a_fall_that_lasts_and_is_no_chance(
    robust: list[float | None], images: int, collapsed: bool
) -> None:
    found = find_collapse(robust, images=images, chance=0.02, planned=40)
    assert (found is not None) == collapsed


def test_chance_is_the_most_frequent_class() -> None:
    watching = monitor(torch.zeros(6, 1, 2, 2), torch.tensor([3, 1, 3, 0, 3, 1]))
    assert (watching.chance, watching.images) == (0.5, 6)


def falling(**keys: Any) -> Training:
    """A run whose robust accuracy falls in its third epoch."""
    answers = [HoldoutAccuracy(0.9, robust) for robust in (0.5, 0.6, 0.0, 0.0, 0.0, 0.0)]
    return training(network(), recipe(epochs=6, **keys), monitor=ScriptedMonitor(*answers))


def test_the_trainer_stops_and_best_is_the_epoch_before() -> None:
    first = falling()
    checkpointer = begin(first)
    first.run(checkpointer, StopRequest())
    assert first.collapse == Collapse(4, 0.0, 2, 0.6, 6)
    assert (first.state.best_epoch, first.state.best) == (2, HoldoutAccuracy(0.9, 0.6))
    assert first.state.epoch == 4 and first.finished and not first.model.training
    # A process that dies before result.json continues with nothing but that.
    again = falling()
    again.load_state_dict(checkpointer.load())
    assert again.finished
    again.run(checkpointer, StopRequest())
    assert (again.collapse, again.state.epoch, again.state.best_epoch) == (first.collapse, 4, 2)


def test_stopping_on_a_collapse_can_be_switched_off() -> None:
    regardless = falling(stop_on_collapse=False)
    regardless.run(begin(regardless), StopRequest())
    assert (regardless.collapse, regardless.state.best_epoch, regardless.state.epoch) == (None, 2, 6)


def test_rank_is_robust_accuracy_first_and_clean_accuracy_on_ties() -> None:
    order = [HoldoutAccuracy(0.9, 0.1), HoldoutAccuracy(0.5, 0.2), HoldoutAccuracy(0.6, 0.2), HoldoutAccuracy(0.1, 0.3)]
    assert sorted(order, key=lambda accuracy: accuracy.rank) == order
    assert HoldoutAccuracy(0.5, None).rank < HoldoutAccuracy(0.6, None).rank


def test_evaluates_in_eval_mode_and_restores_the_mode_after_a_failure() -> None:
    model = network().train()
    x = torch.rand(12, 1, 8, 8)
    y = model.eval()(x).argmax(dim=1)
    model.train()
    # In train mode the answer to one image alone is noise.
    assert monitor(x, y, epsilon=None, batch_size=1).evaluate(model).clean == 1.0
    with pytest.raises(RuntimeError):
        monitor(torch.rand(2, 3, 8, 8), torch.zeros(2).long(), epsilon=None).evaluate(model)
    assert model.training
