"""Gaussian and uniform noise against their formula, drawn by hand from the same generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import gaussian_noise, uniform_noise
from robustq.errors import UsageError

EPSILON = 8 / 255
Y = torch.zeros(4, dtype=torch.int64)


def never(x: Tensor) -> Tensor:
    raise AssertionError("noise asks the model nothing")


def gray() -> Tensor:
    return torch.full((4, 3, 20, 20), 0.5)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_gaussian_noise_is_clipped_normal_noise_of_sigma_epsilon() -> None:
    x = gray()
    normal = torch.randn(x.shape, generator=seeded())
    expected = x + (EPSILON * normal).clamp(-EPSILON, EPSILON)
    x_adv = gaussian_noise(never, x, Y, epsilon=EPSILON, generator=seeded())
    # Clipping before or after the sum with x: one float32 rounding of a number near 0.5.
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-7)


def test_gaussian_noise_takes_its_sigma() -> None:
    x = gray()
    narrow = gaussian_noise(never, x, Y, epsilon=EPSILON, sigma=EPSILON / 8, generator=seeded())
    # 4,800 draws of sigma epsilon / 8, none of which reaches the ball's edge: 1% is the standard error of a spread.
    assert (narrow - x).std().item() == pytest.approx(EPSILON / 8, rel=0.05)


def test_unbounded_gaussian_noise_leaves_the_ball_but_not_the_cube() -> None:
    x = gray()
    x[:, :, :2] = 0.0
    x[:, :, 2:4] = 1.0
    normal = torch.randn(x.shape, generator=seeded())
    x_adv = gaussian_noise(never, x, Y, epsilon=EPSILON, bounded=False, generator=seeded())
    assert torch.equal(x_adv, (x + EPSILON * normal).clamp(0, 1))
    assert (x_adv - x).abs().max() > 2 * EPSILON


def test_uniform_noise_is_uniform_in_the_ball() -> None:
    x = gray()
    uniform = 2 * torch.rand(x.shape, generator=seeded()) - 1
    x_adv = uniform_noise(never, x, Y, epsilon=EPSILON, generator=seeded())
    # At the very edge the projection may differ by one rounding.
    torch.testing.assert_close(x_adv, x + EPSILON * uniform, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", [-0.1, 8.0, float("nan")])
def test_impossible_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match="sigma"):
        gaussian_noise(never, gray(), Y, epsilon=EPSILON, sigma=sigma)
