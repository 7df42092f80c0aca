"""PGD and BIM on linear models, and which iterate PGD returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustq.attacks import bim, pgd
from robustq.attacks.losses import Loss, cross_entropy, margin

EPSILON = 8 / 255


def linear(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (classes, 12), images (6, 3, 2, 2) away from 0 and 1, labels (6,)."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(classes, 12, generator=generator)
    x = 0.3 + 0.4 * torch.rand(6, 3, 2, 2, generator=generator)
    return weight, x, torch.arange(6) % classes


def uphill(weight: Tensor, y: Tensor) -> Tensor:
    """sign(w_j - w_y) for two classes: the direction of both losses everywhere."""
    return (weight[1 - y] - weight[y]).sign().view(-1, 3, 2, 2)


@pytest.mark.parametrize(("steps", "reach"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_bim_walks_straight_to_the_corner(steps: int, reach: float) -> None:
    weight, x, y = linear(2)
    x_adv = bim(lambda x: x.flatten(1) @ weight.T, x, y, epsilon=EPSILON, step_size=0.3 * EPSILON, steps=steps)
    # Up to four float32 sums of numbers below 1.
    torch.testing.assert_close(x_adv, x + reach * EPSILON * uphill(weight, y), rtol=0, atol=3e-7)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_pgd_reaches_the_corner_from_any_start(loss: Loss) -> None:
    weight, x, y = linear(2)
    # Ten steps of epsilon / 4 cross the ball from any of its points, so the end is the corner itself: exact.
    x_adv = pgd(
        lambda x: x.flatten(1) @ weight.T,
        x,
        y,
        epsilon=EPSILON,
        steps=10,
        loss=loss,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(x_adv, x + EPSILON * uphill(weight, y))


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_first_step_of_pgd_follows_its_loss_from_its_start(loss: Loss) -> None:
    weight, x, y = linear(3)
    step = EPSILON / 4
    start = x + EPSILON * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) - 1)
    z = start.double().flatten(1) @ weight.double().T
    onehot = torch.nn.functional.one_hot(y, 3).double()
    if loss is cross_entropy:
        slope = z.softmax(dim=1) - onehot
    else:
        rival = (z - 1e9 * onehot).argmax(dim=1)
        slope = torch.nn.functional.one_hot(rival, 3).double() - onehot
    direction = (slope @ weight.double()).sign().float().view_as(x)
    expected = torch.minimum(torch.maximum(start + step * direction, x - EPSILON), x + EPSILON)
    x_adv = pgd(
        lambda x: x.flatten(1) @ weight.T,
        x,
        y,
        epsilon=EPSILON,
        step_size=step,
        steps=1,
        loss=loss,
        generator=torch.Generator().manual_seed(4),
    )
    # Two float32 sums of numbers below 1.
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=2e-7)


def test_the_two_losses_lead_to_different_pictures() -> None:
    # Guards the test above: with three classes the losses must not agree everywhere.
    weight, x, y = linear(3)
    first, second = (
        pgd(lambda x: x.flatten(1) @ weight.T, x, y, epsilon=EPSILON, steps=1, loss=loss, random_start=False)
        for loss in (cross_entropy, margin)
    )
    assert not torch.equal(first, second)


def test_bim_is_pgd_without_random_start() -> None:
    weight, x, y = linear(3)

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    plain = pgd(model, x, y, epsilon=EPSILON, step_size=EPSILON / 3, steps=2, random_start=False)
    assert torch.equal(bim(model, x, y, epsilon=EPSILON, step_size=EPSILON / 3, steps=2), plain)


def test_step_longer_than_the_ball_is_projected() -> None:
    weight, x, y = linear(2)
    x_adv = bim(lambda x: x.flatten(1) @ weight.T, x, y, epsilon=1 / 255, step_size=4 / 255, steps=3)
    assert torch.equal(x_adv, x + (1 / 255) * uphill(weight, y))


def band(x: Tensor) -> Tensor:
    """Two classes on one pixel: class 1 wins where |x - 0.55| < sqrt(0.002), about 0.045, and most at 0.55."""
    pixel = x.flatten(1)
    return torch.cat([torch.zeros_like(pixel), 0.002 - (pixel - 0.55) ** 2], dim=1)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_last_iterate_is_returned_unless_told_otherwise() -> None:
    # From 0.5 the steps of 0.06 go to 0.56 (wrong), then back to 0.50 (right).
    x, y = pixels(0.5), torch.tensor([0])
    last = pgd(band, x, y, epsilon=0.2, step_size=0.06, steps=2, random_start=False)
    torch.testing.assert_close(last, pixels(0.5), rtol=0, atol=1e-6)  # two float32 sums


def test_keep_best_returns_a_misclassified_iterate_from_anywhere_on_the_way() -> None:
    x, y = pixels(0.5, 0.44, 0.9), torch.tensor([0, 0, 0])
    best = pgd(band, x, y, epsilon=0.2, step_size=0.06, steps=2, random_start=False, keep_best=True)
    # Image 0 is wrong in the middle (0.56), image 1 at the end (0.56, after 0.44 and 0.50), image 2 never: there the
    # highest loss is at the end of the way, 0.78.
    torch.testing.assert_close(best, pixels(0.56, 0.56, 0.78), rtol=0, atol=1e-6)


def test_keep_best_prefers_misclassified_to_a_higher_loss() -> None:
    def inverted(logits: Tensor, y: Tensor) -> Tensor:
        return -margin(logits, y)

    # Ascending the inverted margin leaves the band: the start is wrong, later iterates are right with higher losses.
    x, y = pixels(0.56), torch.tensor([0])
    best = pgd(band, x, y, epsilon=0.2, step_size=0.06, steps=2, loss=inverted, random_start=False, keep_best=True)
    assert torch.equal(best, x)


@pytest.mark.parametrize(
    ("start", "epsilon", "step_size", "best"),
    [
        (0.52, 0.2, 0.025, 0.545),  # 0.52, 0.545, 0.57: the middle one is nearest to the peak at 0.55
        (0.54, 0.05, 0.07, 0.54),  # 0.54, 0.59 (edge of the ball), 0.52: the first one is
        (0.515, 0.2, 0.0175, 0.55),  # 0.515, 0.5325, 0.55: the last one is
    ],
)
def test_keep_best_takes_the_highest_loss_among_misclassified_iterates(
    start: float, epsilon: float, step_size: float, best: float
) -> None:
    x, y = pixels(start), torch.tensor([0])
    settings: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size, "steps": 2, "random_start": False}
    kept = pgd(band, x, y, keep_best=True, **settings)
    torch.testing.assert_close(kept, pixels(best), rtol=0, atol=1e-6)


def test_keep_best_remembers_the_misclassified_iterate() -> None:
    def rising(x: Tensor) -> Tensor:
        return band(x) + x.flatten(1)

    def height(logits: Tensor, y: Tensor) -> Tensor:
        return logits[:, 0]

    # The loss is the pixel itself: 0.48 (right), 0.54 (wrong), then 0.60 and 0.66 (right), ever higher.
    x, y = pixels(0.48), torch.tensor([0])
    best = pgd(rising, x, y, epsilon=0.3, step_size=0.06, steps=3, loss=height, random_start=False, keep_best=True)
    torch.testing.assert_close(best, pixels(0.54), rtol=0, atol=1e-6)


def test_keep_best_counts_nan_logits_as_misclassified() -> None:
    def nan_in_the_middle(x: Tensor) -> Tensor:
        logits = torch.cat([1.0 - x.flatten(1), x.flatten(1) - 1.0], dim=1)
        return torch.where((x.flatten(1) - 0.56).abs() < 0.01, torch.nan, logits)

    x, y = pixels(0.5), torch.tensor([0])
    best = pgd(nan_in_the_middle, x, y, epsilon=0.2, step_size=0.06, steps=2, random_start=False, keep_best=True)
    torch.testing.assert_close(best, pixels(0.56), rtol=0, atol=1e-6)
