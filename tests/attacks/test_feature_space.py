"""The feature-space attack and transfer: first steps by hand, and whom they ask about what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import Counted, ImageGenerators, feature_space, transfer
from robustq.attacks.ball import uniform_start
from robustq.attacks.losses import cross_entropy, margin
from robustq.errors import UsageError
from robustq.hardening.features import FeatureTap
from tests.models.small_nets import digits, small_spec, trained

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


@pytest.mark.parametrize("guided", [False, True])
def test_first_step(guided: bool) -> None:
    streams = ImageGenerators.of(0, range(6))
    start = uniform_start(X, epsilon=EPSILON, generator=streams.child("feature space"))
    guides = X.flip(0) if guided else None
    seen: list[Tensor] = []

    def watched(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.detach().clone())
        return features(x)

    feature_space(
        model, X, Y, epsilon=EPSILON, features=watched, guides=guides, steps=2, step_size=0.01, generator=streams
    )
    assert torch.equal(seen[0], X if guides is None else guides)
    assert torch.equal(seen[1], start)
    # The gradient of |W x_t - f|^2 is 2 W^T (W x_t - f); towards a guide it is descended.
    reference = (X if guides is None else guides).double().flatten(1) @ INNER.double().T
    slope = (start.double().flatten(1) @ INNER.double().T - reference) @ INNER.double()
    step = 0.01 * slope.sign().float().view_as(X) * (1 if guides is None else -1)
    expected = torch.minimum(torch.maximum(start + step, X - EPSILON), X + EPSILON)
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=2e-7)  # two float32 sums


def test_features_of_a_layer_of_a_trained_network_break_it() -> None:
    network = trained(small_spec(4))
    images, y = digits()
    x, y = (images[:60].float() / 255), y[:60]
    tap = FeatureTap(network, "pooled")
    counted = Counted(network, images=60)
    x_adv = feature_space(
        counted,
        x,
        y,
        epsilon=32 / 255,
        features=counted.sharing(tap),
        steps=20,
        generator=ImageGenerators.of(0, range(60)),
    )
    with torch.no_grad():
        before, after = (int((network(pictures).argmax(dim=1) == y).sum()) for pictures in (x, x_adv))
        moved = (tap(x_adv)[1] - tap(x)[1]).norm(dim=1)
        noise = (
            tap(uniform_start(x, epsilon=32 / 255, generator=ImageGenerators.of(1, range(60))))[1] - tap(x)[1]
        ).norm(dim=1)
    assert after <= before - 15
    assert float(moved.median()) >= 2 * float(noise.median())
    assert int(counted.gradient_steps.max()) == 20
    assert counted.queries.max() == 3


def test_guides_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="guides have shape"):
        feature_space(model, X, Y, epsilon=EPSILON, features=features, guides=X[:3])


def test_transfer_asks_the_model_about_one_picture_of_each_surrogate() -> None:
    def other(x: Tensor) -> Tensor:
        return x.flatten(1) @ INNER[:3].T

    def third(x: Tensor) -> Tensor:
        return x.flatten(1) @ INNER[2:].T

    asked: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        asked.append(x.clone())
        return model(x).detach()

    transfer(
        judge, X, Y, epsilon=EPSILON, surrogates=[other, third], steps=10, generator=ImageGenerators.of(0, range(6))
    )
    assert len(asked) == 3
    assert torch.equal(asked[0], X)
    for surrogate, pictures in zip((other, third), asked[1:], strict=True):
        # APGD ends at the surrogate's own worst point for cross-entropy, also for images that it had wrong anyway.
        assert bool((margin(surrogate(pictures), Y) > margin(surrogate(X), Y)).all())
        raised = cross_entropy(surrogate(pictures), Y) - cross_entropy(surrogate(X), Y)
        assert bool((raised > 0).all())
        assert float((pictures - X).abs().max()) <= EPSILON + 1e-6


def test_what_one_surrogate_broke_the_next_one_is_not_asked_about() -> None:
    images_asked: list[int] = []

    def weak(x: Tensor) -> Tensor:
        score = x.flatten(1).mean(dim=1)
        return torch.stack([torch.full_like(score, 0.5 + EPSILON / 2), score], dim=1)

    def second(x: Tensor) -> Tensor:
        images_asked.append(len(x))
        return weak(x)

    flat = torch.full((4, 1, 4, 4), 0.5)
    flat[2:] = 0.2
    transfer(
        weak,
        flat,
        Y[:4],
        epsilon=EPSILON,
        surrogates=[weak, second],
        steps=5,
        generator=ImageGenerators.of(0, range(4)),
    )
    assert set(images_asked) == {2}


def test_no_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match="surrogates"):
        transfer(model, X, Y, epsilon=EPSILON, surrogates=[])
