"""Losses against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustq.attacks.base import input_gradient
from robustq.attacks.losses import Loss, cross_entropy, kl, margin

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 3.0], [-40.0, 60.0, 10.0]])
LABELS = torch.tensor([0, 2, 0])


def test_cross_entropy_per_image() -> None:
    z = LOGITS.double()
    by_hand = z.logsumexp(dim=1) - z[torch.arange(3), LABELS]
    # float32 against float64: 1e-6 is a few units in the last place.
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS).double(), by_hand, rtol=1e-6, atol=0)


def test_margin_per_image() -> None:
    # Differences of small numbers of halves: exact.
    assert margin(LOGITS, LABELS).tolist() == [-1.5, 0.0, 100.0]


def test_margin_gradient_survives_confidence_where_cross_entropy_saturates() -> None:
    z = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    y = torch.tensor([0])
    (of_margin,) = torch.autograd.grad(margin(z, y).sum(), z)
    (of_entropy,) = torch.autograd.grad(cross_entropy(z, y).sum(), z)
    assert of_margin.tolist() == [[-1.0, 1.0, 0.0]]
    assert of_entropy.abs().max() == 0.0


def test_margin_gives_the_gradient_to_one_of_equal_runners_up() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(z, torch.tensor([0])).sum(), z)
    assert sorted(gradient[0].tolist()) == [-1.0, 0.0, 1.0]


def test_kl_per_image() -> None:
    clean, moved = LOGITS, LOGITS.flip(1) * 0.5
    p, q = clean.double().softmax(dim=1), moved.double().softmax(dim=1)
    by_hand = (p * (p.log() - q.log())).sum(dim=1)
    # Row 3 is 1.4e-11, from a log(1 - 1e-11) that is 0 in float32; 1e-7 is half a unit in the last place of 1.
    torch.testing.assert_close(kl(moved, clean).double(), by_hand, rtol=1e-6, atol=1e-7)
    assert kl(clean, clean).abs().max() == 0.0


def test_kl_is_finite_for_saturated_logits() -> None:
    clean, moved = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert kl(moved, clean).item() == 1000.0


def test_kl_gradient_is_the_difference_of_the_probabilities() -> None:
    clean = LOGITS.double()
    moved = (clean.flip(1) * 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(kl(moved, clean).sum(), moved)
    # float64 on both sides; 1e-12 is far above its rounding.
    torch.testing.assert_close(gradient, moved.softmax(1) - clean.softmax(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, margin, lambda z, y: kl(z, torch.zeros_like(z))])
def test_half_precision_is_raised(loss: Loss) -> None:
    half = loss(LOGITS.bfloat16(), LABELS)
    assert half.dtype == torch.float32
    # These logits are exact in bfloat16, so nothing may differ.
    assert torch.equal(half, loss(LOGITS, LABELS))


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_gradient_of_an_image_does_not_depend_on_its_batch(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 3, generator=generator)
    x = torch.rand(5, 3, 2, 2, generator=generator)
    y = torch.tensor([0, 1, 2, 0, 1])

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return input_gradient(lambda x: x.flatten(1) @ weight, x, lambda z: loss(z, y)).gradient

    alone = torch.cat([gradient(x[i : i + 1], y[i : i + 1]) for i in range(5)])
    # A matrix product may order its sums by batch size: a few float32 roundings of numbers around 1.
    torch.testing.assert_close(gradient(x, y), alone, rtol=0, atol=1e-6)


def test_input_gradient_reports_losses_and_logits() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    y = torch.tensor([0, 1])
    slope = input_gradient(lambda x: x.flatten(1) * torch.tensor([2.0, 4.0]), x, lambda z: margin(z, y))
    assert slope.logits.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert slope.losses.tolist() == [1.0, -1.0]
    assert slope.gradient.flatten(1).tolist() == [[-2.0, 4.0], [2.0, -4.0]]
    assert not (slope.logits.requires_grad or slope.losses.requires_grad or slope.gradient.requires_grad)
    assert math.isclose(float(x.sum()), 2.0)


def test_input_gradient_turns_nan_into_0() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    # sqrt(0 * pixel) is 0, and its gradient inf * 0; the other pixel keeps its own.
    slope = input_gradient(lambda x: torch.sqrt(x.flatten(1) * torch.tensor([0.0, 2.0])), x, lambda z: z.sum(dim=1))
    assert slope.gradient.flatten().tolist() == [0.0, 1.0]
