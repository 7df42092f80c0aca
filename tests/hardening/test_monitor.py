"""The monitor on a linear model, whose answer to PGD-10 is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.hardening.monitor import Monitor, HoldoutAccuracy
from robustq.models.spec import ModelSpec, build_model

EPSILON = 0.05


class Linear(nn.Module):
    """Two classes; class 1 where the mean of x is over 1/2, which every pixel moves alike."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        difference = self.scale * (x.flatten(1) - 0.5).sum(dim=1)
        return torch.stack([-difference, difference], dim=1)


def graded() -> tuple[Tensor, Tensor]:
    """Constant images, labelled 1. Below 1/2: wrong. Up to 1/2 + epsilon: right until attacked. Above: robust."""
    levels = torch.tensor([0.30, 0.47, 0.51, 0.53, 0.545, 0.56, 0.70, 0.90])
    return levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), torch.ones(8, dtype=torch.int64)


def test_counts_are_those_of_the_closed_form() -> None:
    x, y = graded()
    # 6 of 8 right; the ball's worst corner turns the three below 0.55. Ten steps of epsilon / 4 reach it from anywhere.
    assert Monitor(x, y, epsilon=EPSILON, batch_size=100, seed=0).watch(Linear()) == HoldoutAccuracy(6 / 8, 3 / 8)


def test_a_random_start_alone_is_not_the_attack() -> None:
    x, y = graded()
    model = Linear()
    watched = Monitor(x, y, epsilon=EPSILON, batch_size=100, seed=0).watch(model)
    assert watched.robust == 3 / 8
    # clean, ten steps, and the count
    assert model.calls == 12


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    x, y = graded()
    assert Monitor(x, y, epsilon=EPSILON, batch_size=batch_size, seed=0).watch(Linear()) == HoldoutAccuracy(
        6 / 8, 3 / 8
    )


def test_without_a_radius_only_clean_accuracy_is_counted() -> None:
    x, y = graded()
    model = Linear()
    assert Monitor(x, y, epsilon=None, batch_size=100, seed=0).watch(model) == HoldoutAccuracy(6 / 8, None)
    assert model.calls == 1


def test_a_model_that_is_always_wrong() -> None:
    x, y = graded()
    assert Monitor(x, 0 * y, epsilon=EPSILON, batch_size=3, seed=0).watch(Linear()) == HoldoutAccuracy(2 / 8, 1 / 8)
    assert Monitor(x[2:], 0 * y[2:], epsilon=EPSILON, batch_size=3, seed=0).watch(Linear()) == HoldoutAccuracy(0.0, 0.0)


def test_nan_logits_are_wrong() -> None:
    x, y = graded()
    model = Linear()
    nn.init.constant_(model.scale, float("nan"))
    assert Monitor(x, 0 * y, epsilon=EPSILON, batch_size=3, seed=0).watch(model) == HoldoutAccuracy(0.0, 0.0)


def test_rank_is_robust_accuracy_first_and_clean_accuracy_on_ties() -> None:
    order = [HoldoutAccuracy(0.9, 0.1), HoldoutAccuracy(0.5, 0.2), HoldoutAccuracy(0.6, 0.2), HoldoutAccuracy(0.1, 0.3)]
    assert sorted(order, key=lambda watched: watched.rank) == order
    assert HoldoutAccuracy(0.5, None).rank < HoldoutAccuracy(0.6, None).rank


def resnet8() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec("resnet8", 32, 32, 10, 1, 8, "digits", None, ()))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = resnet8().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    Monitor(x, y, epsilon=EPSILON, batch_size=5, seed=0).watch(model)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_judges_in_eval_mode() -> None:
    # An image's answer in eval mode does not depend on its neighbours; in train mode that of one image alone is noise.
    model = resnet8().train()
    x = torch.rand(12, 1, 8, 8)
    y = model.eval()(x).argmax(dim=1)
    model.train()
    assert Monitor(x, y, epsilon=None, batch_size=1, seed=0).watch(model).clean == 1.0


def test_mode_comes_back_after_a_failure() -> None:
    model = resnet8().train()
    with pytest.raises(RuntimeError):
        Monitor(torch.rand(2, 3, 8, 8), torch.zeros(2).long(), epsilon=None, batch_size=2, seed=0).watch(model)
    assert model.training


class Recorder(nn.Module):
    """Linear, with the images of every call kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        logits: Tensor = self.inner(x)
        return logits


def test_every_epoch_starts_from_the_same_point_and_another_seed_from_another() -> None:
    x, y = graded()
    monitor = Monitor(x, y, epsilon=EPSILON, batch_size=100, seed=3)
    starts = []
    for watching in (monitor, monitor, Monitor(x, y, epsilon=EPSILON, batch_size=100, seed=4)):
        model = Recorder()
        watching.watch(model)
        # Call 0 is the clean count; call 1 looks at the start, inside the ball and not at the images themselves.
        starts.append(model.seen[1])
        assert 0 < (model.seen[1] - x[2:]).abs().max() <= EPSILON + 1e-6
        # Each step is epsilon / 4 long: after the first, every pixel went down by it, or to the wall of the ball.
        want = torch.maximum(starts[-1] - EPSILON / 4, x[2:] - EPSILON)
        torch.testing.assert_close(model.seen[2], want, rtol=0, atol=1e-6)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
