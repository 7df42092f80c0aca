"""TPGD's steps against hand-written gradients on a linear model, and why it needs its start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import tpgd
from robustq.attacks.base import input_gradient
from robustq.attacks.losses import cross_entropy, kl
from robustq.errors import UsageError

EPSILON = 8 / 255
STEP = 2 / 255

_generator = torch.Generator().manual_seed(9)
WEIGHT = torch.randn(4, 12, generator=_generator)
X = 0.3 + 0.4 * torch.rand(8, 3, 2, 2, generator=_generator)
Y = torch.arange(8) % 4


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT.T


def probabilities(x: Tensor) -> Tensor:
    return (x.double().flatten(1) @ WEIGHT.double().T).softmax(dim=1)


def first_step(*, start: float, rho: float | None) -> Tensor:
    """The first step of TPGD by hand, its gradient W^T (q - p), or W^T (q - onehot(y) + (q - p) / rho) with rho."""
    uniform = 2 * torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) - 1
    x_0 = torch.minimum(torch.maximum(X + start * uniform, X - EPSILON), X + EPSILON)
    p, q = probabilities(X), probabilities(x_0)
    slope = q - p if rho is None else q - torch.nn.functional.one_hot(Y, 4) + (q - p) / rho
    direction = (slope @ WEIGHT.double()).sign().float().view_as(X)
    return torch.minimum(torch.maximum(x_0 + STEP * direction, X - EPSILON), X + EPSILON)


# rho of 0.005 weighs both terms alike here (q - p is small after a start of 1/255).
@pytest.mark.parametrize("rho", [None, 0.005, 1.0])
@pytest.mark.parametrize("start", [1 / 255, 4 / 255, 1.0])
def test_first_step(start: float, rho: float | None) -> None:
    x_adv = tpgd(
        linear,
        X,
        Y,
        epsilon=EPSILON,
        step_size=STEP,
        steps=1,
        start=start,
        rho=rho,
        generator=torch.Generator().manual_seed(0),
    )
    # Two float32 sums of numbers below 1.
    torch.testing.assert_close(x_adv, first_step(start=start, rho=rho), rtol=0, atol=2e-7)


def test_rho_weighs_two_terms_that_disagree() -> None:
    # Guards the test above: KL alone, both, and nearly cross-entropy alone must be three different steps.
    steps = [first_step(start=1 / 255, rho=rho) for rho in (None, 0.005, 1.0)]
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])


def test_labels_do_not_matter_without_rho() -> None:
    def attack(y: Tensor, rho: float | None) -> Tensor:
        return tpgd(linear, X, y, epsilon=EPSILON, rho=rho, generator=torch.Generator().manual_seed(0))

    assert torch.equal(attack(Y, None), attack(Y.flip(0), None))
    assert not torch.equal(attack(Y, 1.0), attack(Y.flip(0), 1.0))


def test_clean_answer_is_asked_once_and_held() -> None:
    asked = []

    def counting(x: Tensor) -> Tensor:
        asked.append((x.requires_grad, torch.is_grad_enabled()))
        return linear(x)

    tpgd(counting, X, Y, epsilon=EPSILON, steps=5, generator=torch.Generator().manual_seed(0))
    assert asked == [(False, False)] + 5 * [(True, True)]


def test_kl_has_no_gradient_at_the_clean_image_itself() -> None:
    def largest(objective: str) -> float:
        x, weight = X.double(), WEIGHT.double()
        clean = x.flatten(1) @ weight.T
        slope = input_gradient(
            lambda x: x.flatten(1) @ weight.T,
            x,
            (lambda z: kl(z, clean)) if objective == "kl" else (lambda z: cross_entropy(z, Y)),
        )
        return slope.gradient.abs().max().item()

    # Zero up to float64's rounding of probabilities times weights around 1, where cross-entropy has a slope.
    assert largest("kl") <= 1e-14
    assert largest("cross-entropy") >= 0.1


def test_start_survives_an_8_bit_input_quantizer() -> None:
    picture = (X * 255).round() / 255

    def changed(x: Tensor) -> float:
        return ((x * 255).round() != (picture * 255).round()).double().mean().item()

    # A step of 0 shows the start itself.
    start = tpgd(
        linear, picture, Y, epsilon=EPSILON, step_size=0.0, steps=1, generator=torch.Generator().manual_seed(0)
    )
    # Uniform in +-1 level: half of it passes half a level. 96 pixels: 0.5 +- 3 standard deviations of 0.05.
    assert 0.35 <= changed(start) <= 0.65
    usual = picture + 0.001 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
    # 0.255 levels of spread: 5% of a normal distribution is beyond half a level.
    assert changed(usual) <= 0.12


@pytest.mark.parametrize("start", [0.0, 0.001, 8.0, float("nan")])
def test_start_that_an_8_bit_input_erases_is_refused(start: float) -> None:
    with pytest.raises(UsageError, match="start"):
        tpgd(linear, X, Y, epsilon=EPSILON, start=start)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_impossible_rho_is_refused(rho: float) -> None:
    with pytest.raises(UsageError, match="rho"):
        tpgd(linear, X, Y, epsilon=EPSILON, rho=rho)
