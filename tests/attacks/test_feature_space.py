"""The feature-space attack and transfer: first steps by hand, and the queries that each model gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import ImageGenerators, feature_space, transfer
from robustq.attacks.ball import uniform_start
from robustq.attacks.base import Model
from robustq.attacks.losses import cross_entropy, margin
from robustq.errors import UsageError

EPSILON = 8 / 255
_GENERATOR = torch.Generator().manual_seed(5)
X = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=_GENERATOR)
Y = torch.zeros(6, dtype=torch.int64)
INNER = torch.randn(5, 16, generator=_GENERATOR)
OUTER = torch.randn(3, 5, generator=_GENERATOR)


def features(x: Tensor) -> tuple[Tensor, Tensor]:
    inner = (x.flatten(1) @ INNER.T).reshape(-1, 5, 1, 1)
    return inner.flatten(1) @ OUTER.T + 1e3 * torch.eye(3)[0], inner


def model(x: Tensor) -> Tensor:
    return features(x)[0]


def test_first_step_moves_away_from_the_clean_features() -> None:
    generators = ImageGenerators.of(0, range(6))
    start = uniform_start(X, epsilon=EPSILON, generator=generators.child("feature space"))
    seen: list[Tensor] = []

    def watched(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.detach().clone())
        return features(x)

    feature_space(model, X, Y, epsilon=EPSILON, features=watched, steps=2, step_size=0.01, generator=generators)
    assert torch.equal(seen[0], X)
    assert torch.equal(seen[1], start)
    # The gradient of |W x_t - W x|^2 is 2 W^T W (x_t - x).
    slope = (start.double() - X.double()).flatten(1) @ INNER.double().T @ INNER.double()
    expected = start + 0.01 * slope.sign().float().view_as(X)
    expected = torch.minimum(torch.maximum(expected, X - EPSILON), X + EPSILON)
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=2e-7)  # two float32 sums


def test_transfer_queries_the_model_with_one_image_of_each_surrogate() -> None:
    surrogates: list[Model] = [lambda x: x.flatten(1) @ INNER[:3].T, lambda x: x.flatten(1) @ INNER[2:].T]
    queried: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        queried.append(x.clone())
        return model(x).detach()

    generators = ImageGenerators.of(0, range(6))
    transfer(judge, X, Y, epsilon=EPSILON, surrogates=surrogates, steps=10, generator=generators)
    clean, *found = queried
    assert torch.equal(clean, X)
    for surrogate, images in zip(surrogates, found, strict=True):
        # APGD ends at the surrogate's own worst point for cross-entropy, also for images that it had wrong anyway.
        assert bool((margin(surrogate(images), Y) > margin(surrogate(X), Y)).all())
        assert bool((cross_entropy(surrogate(images), Y) > cross_entropy(surrogate(X), Y)).all())
        assert float((images - X).abs().max()) <= EPSILON + 1e-6


def test_images_that_one_surrogate_broke_are_not_attacked_on_the_next() -> None:
    sizes: list[int] = []

    def weak(x: Tensor) -> Tensor:
        score = x.flatten(1).mean(dim=1)
        return torch.stack([torch.full_like(score, 0.5 + EPSILON / 2), score], dim=1)

    def second(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return weak(x)

    flat = torch.full((4, 1, 4, 4), 0.5)
    flat[2:] = 0.2
    transfer(weak, flat, Y[:4], epsilon=EPSILON, surrogates=[weak, second], steps=5)
    assert set(sizes) == {2}
    with pytest.raises(UsageError, match="surrogates"):
        transfer(model, X, Y, epsilon=EPSILON, surrogates=[])
