"""Losses against closed forms in float64."""

from __future__ import annotations

import pytest
import torch

from robustq.attacks.losses import (
    Loss,
    cross_entropy,
    dlr,
    kl,
    margin,
    rescaled_cross_entropy,
    targeted_dlr,
    unsaturating_factor,
)

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 3.0], [-40.0, 60.0, 10.0]])
LABELS = torch.tensor([0, 2, 0])


def test_losses_per_image() -> None:
    z = LOGITS.double()
    by_hand = z.logsumexp(dim=1) - z[torch.arange(3), LABELS]
    # float32 against float64: 1e-6 is a few units in the last place.
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS).double(), by_hand, rtol=1e-6, atol=0)
    # Differences of small numbers of halves: exact.
    assert margin(LOGITS, LABELS).tolist() == [-1.5, 0.0, 100.0]
    assert dlr(LOGITS, LABELS).tolist() == [-0.5, 0.0, 1.0]
    four = torch.tensor([[4.0, 1.0, 0.0, -1.0]])
    assert targeted_dlr(four, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(-3.0 / 4.5, rel=1e-6)


def test_margin_gradient_survives_confidence_where_cross_entropy_saturates() -> None:
    z = torch.tensor([[200.0, 0.0, -5.0], [1.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    (of_margin,) = torch.autograd.grad(margin(z, y).sum(), z)
    (of_entropy,) = torch.autograd.grad(cross_entropy(z[:1], y[:1]).sum(), z)
    assert of_margin[0].tolist() == [-1.0, 1.0, 0.0]
    assert of_entropy.abs().max() == 0.0
    assert sorted(of_margin[1].tolist()) == [-1.0, 0.5, 0.5]  # equal runners-up share it


def test_kl_and_its_gradient() -> None:
    clean, moved = LOGITS, LOGITS.flip(1) * 0.5
    p, q = clean.double().softmax(dim=1), moved.double().softmax(dim=1)
    # Row 3 is 1.4e-11, from a log(1 - 1e-11) that is 0 in float32; 1e-7 is half a unit in the last place of 1.
    torch.testing.assert_close(kl(moved, clean).double(), (p * (p / q).log()).sum(dim=1), rtol=1e-6, atol=1e-7)
    assert kl(clean, clean).abs().max() == 0.0
    assert kl(torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])).item() == 1000.0
    leaf = moved.double().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(leaf, clean.double()).sum(), leaf)
    # float64 on both sides; 1e-12 is far above its rounding.
    torch.testing.assert_close(gradient, q - p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, margin, lambda z, y: kl(z, torch.zeros_like(z))])
def test_half_precision_is_raised(loss: Loss) -> None:
    half = loss(LOGITS.bfloat16(), LABELS)
    assert half.dtype == torch.float32
    # These logits are exact in bfloat16, so nothing may differ.
    assert torch.equal(half, loss(LOGITS, LABELS))


def test_rescaling_factor_is_the_best_of_a_finer_grid() -> None:
    logits = 20 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.logspace(-4, 2, 1000, dtype=torch.float64)

    def hessian_norm(factor: float, z: torch.Tensor) -> float:
        p = (factor * z).softmax(dim=0)
        return float(factor**2 * (torch.diag(p) - torch.outer(p, p)).norm())

    for z, beta in zip(logits, unsaturating_factor(logits).tolist(), strict=True):
        span = float(z.max() - z.min())
        inside = [f for f in grid.tolist() if 0.5 <= f * span <= 100]
        # Half a step of the grid away from the peak loses 2% of it at most.
        assert hessian_norm(beta, z) >= 0.98 * max(hessian_norm(factor, z) for factor in inside)


def test_rescaled_loss_does_not_depend_on_the_scale_of_the_logits() -> None:
    logits = 5 * torch.randn(30, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(30) % 10
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(rescaled_cross_entropy(factor * logits, y), rescaled_cross_entropy(logits, y))
    unusable = torch.tensor([[2.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    assert unsaturating_factor(unusable).tolist() == [1.0, 1.0, 1.0]
