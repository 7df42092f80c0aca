"""Noise against its formula, drawn by hand from the same generator, and random corners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import ImageGenerators, gaussian_noise, random_corners, uniform_noise
from robustq.errors import UsageError

EPSILON = 8 / 255
X, Y = torch.full((4, 3, 20, 20), 0.5), torch.zeros(4, dtype=torch.int64)


def never(x: Tensor) -> Tensor:
    raise AssertionError("noise makes no query")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_noise_follows_its_formula() -> None:
    normal = torch.randn(X.shape, generator=seeded())
    x_adv = gaussian_noise(never, X, Y, epsilon=EPSILON, generator=seeded())
    # Clipping before or after the sum with x: one float32 rounding of a number near 0.5.
    torch.testing.assert_close(x_adv, X + (EPSILON * normal).clamp(-EPSILON, EPSILON), rtol=0, atol=1e-7)
    narrow = gaussian_noise(never, X, Y, epsilon=EPSILON, sigma=EPSILON / 8, generator=seeded())
    torch.testing.assert_close(narrow, X + EPSILON / 8 * normal, rtol=0, atol=1e-7)  # none reaches the edge
    uniform = 2 * torch.rand(X.shape, generator=seeded()) - 1
    x_adv = uniform_noise(never, X, Y, epsilon=EPSILON, generator=seeded())
    torch.testing.assert_close(x_adv, X + EPSILON * uniform, rtol=0, atol=1e-7)
    for sigma in (-0.1, 8.0, float("nan")):
        with pytest.raises(UsageError, match="sigma"):
            gaussian_noise(never, X, Y, epsilon=EPSILON, sigma=sigma)


def test_corners_are_corners_and_the_best_one_is_kept() -> None:
    weight = torch.randn(X[0].numel(), generator=seeded())
    queried: list[Tensor] = []

    def sure(x: Tensor) -> Tensor:
        """Class 0 always wins; the margin is linear in the pixels. Float64: no ties."""
        queried.append(x.clone())
        score = (x.double().flatten(1) * weight).sum(dim=1)
        return torch.stack([torch.full_like(score, 1e4), score], dim=1)

    x_adv = random_corners(sure, X, Y, epsilon=EPSILON, corners=20, generator=ImageGenerators.of(0, range(4)))
    clean, *corners = queried
    assert torch.equal(clean, X) and len(corners) == 20
    for corner in corners:
        torch.testing.assert_close((corner - X).abs(), torch.full_like(X, EPSILON), rtol=0, atol=1e-7)
    scores = torch.stack([sure(corner)[:, 1] for corner in corners])
    assert torch.equal(x_adv, torch.stack(corners)[scores.argmax(dim=0), torch.arange(4)])
    signs = torch.stack([(corner > X).flatten(1) for corner in corners]).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in signs}) == 80
