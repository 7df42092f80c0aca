"""Derivatives of codes and comparisons in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustq.models.quant.backward_rules import PASS_THROUGH, RULES, SMOOTH, STRAIGHT_THROUGH
from robustq.twin.gradients import clip_codes, step, to_codes


def derivative(function: object, x: Tensor) -> list[float]:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)  # type: ignore[operator]
    values: list[float] = found.tolist()
    return values


OUTSIDE_AND_IN = torch.tensor([-40.0, -3.0, 0.0, 2.2, 14.9, 40.0])


@pytest.mark.parametrize("rule", RULES)
def test_a_quantizer_whose_lowest_code_is_zero_is_a_relu_under_every_rule(rule: str) -> None:
    found = derivative(lambda x: to_codes(x, lowest=0, highest=15, zero_point=0.0, rule=rule), OUTSIDE_AND_IN)
    assert found[:2] == [0.0, 0.0]
    assert min(found[2:5]) > 0.0
    if rule != SMOOTH:
        assert found[2:5] == [1.0, 1.0, 1.0]
        assert found[5] == (1.0 if rule == PASS_THROUGH else 0.0)


def test_codes_around_a_zero_point_clip_at_both_ends_by_straight_through_alone() -> None:
    x = torch.tensor([-1.0, 0.4, 128.0, 255.4, 256.0])
    for rule, expected in ((STRAIGHT_THROUGH, [0.0, 1.0, 1.0, 1.0, 0.0]), (PASS_THROUGH, [1.0] * 5)):
        found = derivative(lambda x, rule=rule: to_codes(x, lowest=0, highest=255, zero_point=128.0, rule=rule), x)
        assert found == expected
    assert derivative(lambda x: clip_codes(x, 1, 3, STRAIGHT_THROUGH), torch.tensor([0.0, 1.0, 3.0, 4.0])) == [
        0,
        1,
        1,
        0,
    ]
    assert derivative(lambda x: clip_codes(x, 1, 3, PASS_THROUGH), torch.tensor([0.0, 4.0])) == [1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_a_clip_far_inside_of_its_input_is_a_sign(rule: str) -> None:
    """Otherwise its derivative of 1, in units of a tiny scale, would drown all others."""
    x = torch.linspace(-1000, 1000, 400).reshape(1, 1, 20, 20).requires_grad_()
    (found,) = torch.autograd.grad(to_codes(x, lowest=-1, highest=1, zero_point=0.0, rule=rule).sum(), x)
    # A jump of 2 over a width of the order of 1,000.
    assert 0.0 < float(found.max()) < 2.0 / 100


def test_a_step_has_the_area_of_its_jump() -> None:
    x = torch.linspace(-4, 4, 8001)
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    width = math.sqrt(math.pi / 2) * float(normal.abs().mean())
    assert width == pytest.approx(1.0, abs=0.01)  # one standard deviation
    for rule in (STRAIGHT_THROUGH, SMOOTH):
        slopes = torch.tensor(derivative(lambda x, rule=rule: step(x, (x > 0).float(), rule), x))
        assert float(torch.trapezoid(slopes, x)) == pytest.approx(1.0, abs=0.03)
