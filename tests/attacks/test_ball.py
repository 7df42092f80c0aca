"""Projection, the uniform start, and rounding to uint8 against an integer reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustq.attacks.ball import project, round_to_uint8, uniform_start
from robustq.errors import UsageError

LEVELS = torch.arange(256, dtype=torch.uint8)


def as_image(levels: Tensor) -> Tensor:
    return levels.float() / 255


def test_project_clamps_to_ball_and_cube() -> None:
    x = torch.tensor([0.5, 0.5, 0.5, 0.05, 0.95, 0.5])
    x_adv = torch.tensor([0.7, 0.3, 0.55, -1.0, 2.0, math.nan])
    # Exact: the expected values are formed by the same float32 sums.
    expected = torch.stack([x[0] + 0.1, x[1] - 0.1, x_adv[2], torch.tensor(0.0), torch.tensor(1.0), x[5]])
    assert torch.equal(project(x_adv, x, epsilon=0.1), expected)


def test_uniform_start_fills_the_ball() -> None:
    x = torch.full((4, 3, 50, 50), 0.5)
    noise = uniform_start(x, epsilon=0.1, generator=torch.Generator().manual_seed(0)) - x
    # 30,000 draws: the extremes come within 0.1% of the ends (chance of a miss e^-15 each), the mean within 5 standard
    # errors (0.1 / sqrt(3) / sqrt(30,000) = 3.3e-4 each).
    assert noise.max() >= 0.0999
    assert noise.min() <= -0.0999
    assert noise.abs().max() <= 0.1 + 1e-7
    assert abs(noise.mean().item()) <= 5 * 3.3e-4


# (epsilon, how many levels it allows): the integer truth, worked out by hand.
RADII = [
    (0.0, 0),
    (1 / 255, 1),
    (float(np.float32(8 / 255)), 8),
    (0.0313725, 8),  # 8/255 written with six digits: 7.99999 levels
    (0.031, 7),  # 7.905 levels
    (1.0, 255),
]


@pytest.mark.parametrize(("epsilon", "radius"), RADII)
def test_round_to_uint8_equals_integer_reference(epsilon: float, radius: int) -> None:
    whole = np.arange(-260, 261)
    # Fractions that leave no doubt about the nearest level (float32 is off by up to 5e-5 levels).
    for fraction in (-0.49, -0.25, 0.0, 0.25, 0.49):
        level, step = (grid.ravel() for grid in np.meshgrid(np.arange(256), whole, indexing="ij"))
        x = as_image(torch.from_numpy(level))
        x_adv = torch.from_numpy((level + step + fraction) / 255).float()
        reference = np.clip(level + np.clip(step, -radius, radius), 0, 255)
        rounded = round_to_uint8(x_adv, x, epsilon=epsilon)
        assert rounded.dtype == torch.float32
        # Equal to the last bit to what a uint8 pixel becomes in data loading.
        assert torch.equal(rounded, as_image(torch.from_numpy(reference)))


def test_round_to_uint8_allows_exactly_every_whole_radius() -> None:
    x = as_image(LEVELS)
    for radius in range(256):
        up = round_to_uint8(torch.ones(256), x, epsilon=radius / 255)
        down = round_to_uint8(torch.zeros(256), x, epsilon=radius / 255)
        assert torch.equal((up * 255).round(), (LEVELS.int() + radius).clamp(max=255).float())
        assert torch.equal((down * 255).round(), (LEVELS.int() - radius).clamp(min=0).float())


def test_round_to_uint8_accepts_every_float_form_of_a_level() -> None:
    exact = as_image(LEVELS)
    by_reciprocal = LEVELS.float() * torch.tensor(1 / 255, dtype=torch.float32)
    assert not torch.equal(by_reciprocal, exact)
    assert torch.equal(round_to_uint8(exact, by_reciprocal, epsilon=0.0), exact)
    assert torch.equal(round_to_uint8(by_reciprocal, exact, epsilon=8 / 255), exact)


def test_round_to_uint8_puts_nan_and_infinity_into_the_ball() -> None:
    x = as_image(torch.tensor([100, 100, 100], dtype=torch.uint8))
    x_adv = torch.tensor([math.nan, math.inf, -math.inf])
    expected = as_image(torch.tensor([100, 108, 92], dtype=torch.uint8))
    assert torch.equal(round_to_uint8(x_adv, x, epsilon=8 / 255), expected)


def test_impossible_input_is_refused() -> None:
    for value in (0.5, 100.002 / 255, -1 / 255, 256 / 255, math.nan):
        x = torch.tensor([0.0, value])
        with pytest.raises(UsageError, match="not uint8 pixels"):
            round_to_uint8(x, x, epsilon=8 / 255)
    with pytest.raises(UsageError, match=r"\(1, 3\)"):
        project(torch.zeros(1, 3), torch.zeros(2, 3), epsilon=0.1)
    for epsilon in (-0.1, 8.0, math.nan):
        with pytest.raises(UsageError, match="epsilon"):
            uniform_start(x, epsilon=epsilon)
