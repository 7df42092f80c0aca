"""FGSM, BIM, PGD, TPGD and PGD++ against torchattacks (3.5.1), an independent implementation, and closed forms."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robustq.attacks import ImageGenerators, bim, fgsm, pgd, pgd_plus_plus, tpgd
from robustq.attacks.losses import cross_entropy, margin
from robustq.data import to_float
from robustq.errors import UsageError
from tests.models.small_nets import digits, small_spec, trained

EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 20

# --- torchattacks; the attacks that start at random get the same start, and all is float64 ---------------------------


@functools.cache
def target() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A trained float network, 30 digits, their labels, and a start in the ball around each."""
    images, y = digits()
    x = to_float(images)[:30].double()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (x + (EPSILON * (2 * noise - 1)).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return trained(small_spec(32)).double(), x, y[:30], start


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    # Both are sums of the same few numbers.
    assert float((ours - theirs).abs().max()) <= 1e-6
    assert float((ours - target()[1]).abs().max()) >= 0.9 * EPSILON


def test_fgsm_bim_and_pgd_from_the_image_give_the_images_of_torchattacks() -> None:
    model, x, y, _ = target()
    assert_same(fgsm(model, x, y, epsilon=EPSILON), torchattacks.FGSM(model, eps=EPSILON)(x, y))
    settings: dict[str, Any] = {"epsilon": EPSILON, "step_size": STEP, "steps": STEPS}
    theirs = torchattacks.BIM(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x, y)
    assert_same(bim(model, x, y, **settings), theirs)
    theirs = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=False)(x, y)
    assert_same(pgd(model, x, y, random_start=False, **settings), theirs)


class Noise:
    """Replaces the noise that torchattacks draws."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform_(self, low: float, high: float) -> Tensor:
        assert (low, high) == (-EPSILON, EPSILON)
        return self.noise


def test_pgd_and_tpgd_from_a_random_start_give_the_images_of_torchattacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, start = target()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", lambda images: Noise(start - images))
        their_pgd = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=True)(x, y)
    with monkeypatch.context() as patched:
        # torchattacks multiplies it by 0.001, the factor of TRADES.
        patched.setattr(torch, "randn_like", lambda images: (start - images) / 0.001)
        their_tpgd = torchattacks.TPGD(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x)
    monkeypatch.setattr(importlib.import_module("robustq.attacks.pgd"), "uniform_start", lambda *args, **more: start)
    settings: dict[str, Any] = {"epsilon": EPSILON, "step_size": STEP, "steps": STEPS}
    ours = pgd(model, x, y, **settings)
    assert_same(ours, their_pgd)
    assert_same(tpgd(model, x, y, **settings), their_tpgd)
    # The start matters, so that its being the same was tested.
    assert float((pgd(model, x, y, random_start=False, **settings) - ours).abs().max()) > 1e-3


# --- linear models ---------------------------------------------------------------------------------------------------


def linear(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (classes, 12), images (6, 3, 2, 2) away from 0 and 1, labels (6,)."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(classes, 12, generator=generator)
    x = 0.3 + 0.4 * torch.rand(6, 3, 2, 2, generator=generator)
    return weight, x, torch.arange(6) % classes


def uphill(weight: Tensor, y: Tensor) -> Tensor:
    """sign(w_j - w_y) for two classes: the direction of both losses everywhere."""
    return (weight[1 - y] - weight[y]).sign().view(-1, 3, 2, 2)


def test_bim_walks_straight_to_the_corner() -> None:
    weight, x, y = linear(2)

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    for steps, reach in ((1, 0.3), (4, 1.0)):
        x_adv = bim(model, x, y, epsilon=EPSILON, step_size=0.3 * EPSILON, steps=steps)
        # float32 sums of numbers below 1.
        torch.testing.assert_close(x_adv, x + reach * EPSILON * uphill(weight, y), rtol=0, atol=3e-7)
    # A step longer than the ball is projected.
    x_adv = bim(model, x, y, epsilon=1 / 255, step_size=4 / 255, steps=3)
    assert torch.equal(x_adv, x + (1 / 255) * uphill(weight, y))
    # Ten steps of epsilon / 4 cross the ball from any of its points, so the end is the corner itself: exact.
    for loss in (cross_entropy, margin):
        x_adv = pgd(model, x, y, epsilon=EPSILON, steps=10, loss=loss, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x_adv, x + EPSILON * uphill(weight, y))


# --- the iterate that PGD returns ------------------------------------------------------------------------------------


def band(x: Tensor) -> Tensor:
    """Two classes on one pixel: class 1 wins where |x - 0.55| < sqrt(0.002), about 0.045, and most at 0.55."""
    pixel = x.flatten(1)
    return torch.cat([torch.zeros_like(pixel), 0.002 - (pixel - 0.55) ** 2], dim=1)


def nan_in_the_middle(x: Tensor) -> Tensor:
    logits = torch.cat([1.0 - x.flatten(1), x.flatten(1) - 1.0], dim=1)
    return torch.where((x.flatten(1) - 0.56).abs() < 0.01, torch.nan, logits)


def rising(x: Tensor) -> Tensor:
    return band(x) + x.flatten(1)


@pytest.mark.parametrize(
    ("start", "best", "settings"),
    [
        # From 0.5 the steps of 0.06 go to 0.56 (wrong), then back to 0.50 (right).
        (0.5, 0.5, {"keep_best": False}),
        (0.5, 0.56, {}),
        (0.44, 0.56, {}),  # wrong at the end, after 0.44 and 0.50
        (0.9, 0.78, {}),  # never wrong: the highest loss
        # The highest loss among misclassified iterates:
        (0.52, 0.545, {"step_size": 0.025}),  # 0.52, 0.545, 0.57: the middle one is nearest to the peak at 0.55
        (0.54, 0.54, {"epsilon": 0.05, "step_size": 0.07}),  # 0.54, 0.59 (edge of the ball), 0.52: the first one
        (0.515, 0.55, {"step_size": 0.0175}),  # 0.515, 0.5325, 0.55: the last one
        # Ascending the inverted margin leaves the band: the start is wrong, later iterates have higher losses.
        (0.56, 0.56, {"loss": lambda logits, y: -margin(logits, y)}),
        # The loss is the pixel itself: 0.48 (right), 0.54 (wrong), then 0.60 and 0.66 (right).
        (0.48, 0.54, {"model": rising, "loss": lambda logits, y: logits[:, 0], "steps": 3, "epsilon": 0.3}),
        (0.5, 0.56, {"model": nan_in_the_middle}),  # NaN counts as misclassified
    ],
)
def test_last_and_best_iterate(start: float, best: float, settings: dict[str, Any]) -> None:
    settings = {"epsilon": 0.2, "step_size": 0.06, "steps": 2, "keep_best": True, "model": band, **settings}
    x_adv = pgd(x=torch.full((1, 1, 1, 1), start), y=torch.tensor([0]), random_start=False, **settings)
    assert x_adv.item() == pytest.approx(best, abs=1e-6)  # float32 sums


# --- TPGD and PGD++ --------------------------------------------------------------------------------------------------


def test_tpgd_start_survives_an_8_bit_input_quantizer() -> None:
    weight, x, y = linear(3)
    x = (x * 255).round() / 255
    # A step of 0 shows the start itself.
    start = tpgd(
        lambda x: x.flatten(1) @ weight.T,
        x,
        y,
        epsilon=EPSILON,
        step_size=0.0,
        steps=1,
        generator=torch.Generator().manual_seed(0),
    )
    changed = ((start * 255).round() != (x * 255).round()).double().mean().item()
    # Uniform in +-1 level: half of it passes half a level. 72 pixels: 0.5 +- 3 standard deviations of 0.06.
    assert 0.32 <= changed <= 0.68
    for impossible in (0.0, 0.001, 8.0, float("nan")):
        with pytest.raises(UsageError, match="start"):
            tpgd(lambda x: x.flatten(1) @ weight.T, x, y, epsilon=EPSILON, start=impossible)


def test_rescaling_attacks_what_cross_entropy_cannot() -> None:
    network = trained(small_spec(32)).float()
    images, y = digits()
    x, y = to_float(images)[:60], y[:60]

    def saturated(x: Tensor) -> Tensor:
        return torch.as_tensor(1e3 * network(x))

    def left(x_adv: Tensor) -> int:
        with torch.no_grad():
            return int((network(x_adv).argmax(dim=1) == y).sum())

    epsilon, generators = 24 / 255, ImageGenerators.of(0, range(60))
    undefended = left(pgd_plus_plus(network, x, y, epsilon=epsilon, generator=generators))
    rescaled = left(pgd_plus_plus(saturated, x, y, epsilon=epsilon, generator=generators))
    plain = left(pgd_plus_plus(saturated, x, y, epsilon=epsilon, loss=cross_entropy, generator=generators))
    assert plain >= undefended + 6
    # The same attack except for the rounding of larger logits in float32.
    assert abs(rescaled - undefended) <= 1
    # Where nothing saturates it is PGD with another weighing of the rivals: no stronger and no weaker.
    assert abs(undefended - left(pgd(network, x, y, epsilon=epsilon, keep_best=True, generator=generators))) <= 4
