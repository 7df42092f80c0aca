"""Rounding, clipping to codes, signs and comparisons, with the derivative of a backward rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.models.quant.backward_rules import (
    PASS_THROUGH,
    SMOOTH,
    STRAIGHT_THROUGH,
    WithGradient,
    sign_derivative,
    staircase_derivative,
)

_MOSTLY = 0.5
"""Share of a sign's inputs that lie outside of its codes."""


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def to_codes(
    x: Tensor,
    *,
    lowest: float,
    highest: float,
    zero_point: Tensor | float,
    rule: str,
    whole: Tensor | None = None,
) -> Tensor:
    """Round half to even and clip to codes.

    A quantizer whose lowest code stands for 0 does the work of a ReLU, whose derivative every rule keeps. One of two or
    three codes whose input nearly always lies far outside of them is a sign, and has the derivative of `step`.

    Args:
        x: activations in units of the scale, with the zero point added, before rounding.
        lowest, highest: codes of the quantizer.
        zero_point: the code of 0.
        rule: one of `robustq.models.quant.backward_rules.RULES`.
        whole: codes before clipping, of a quantizer that rounds before it adds the zero point; None: x rounded.

    Returns:
        The codes in float32, in the shape of x.
    """
    differentiate = _recorded(x)
    with torch.no_grad():
        whole = x.round() if whole is None else whole
        value = whole.clamp(lowest, highest)
        if not differentiate:
            return value
        middle = (lowest + highest) / 2
        if highest - lowest <= 2 and (x - middle).abs().gt(highest - lowest).float().mean() > _MOSTLY:
            return _replaced(x, value, (highest - lowest) * _step_derivative(x - middle, rule))
        rectifies = not isinstance(zero_point, Tensor) and zero_point == lowest
        factor = None
        if rule == STRAIGHT_THROUGH:
            factor = ((whole >= lowest) & (whole <= highest)).to(x.dtype)
        elif rule == SMOOTH:
            base = middle if isinstance(zero_point, Tensor) else float(zero_point)
            factor = staircase_derivative(x - base, lowest=lowest - base, highest=highest - base)
        if rectifies:
            positive = (x >= lowest).to(x.dtype)
            factor = positive if factor is None else factor.mul_(positive)
    return _replaced(x, value, factor)


def clip_codes(x: Tensor, lowest: float, highest: float, rule: str) -> Tensor:
    """Codes clipped to fewer; only under straight-through with a derivative of 0 outside."""
    with torch.no_grad():
        value = x.clamp(lowest, highest)
        inside = (value == x).to(x.dtype) if rule == STRAIGHT_THROUGH else None
    return _replaced(x, value, inside) if _recorded(x) else value


def rounded(x: Tensor, value: Tensor) -> Tensor:
    """``value``, a rounding of x, with derivative 1 under every rule."""
    return _replaced(x, value, None) if _recorded(x) else value


def step(x: Tensor, value: Tensor, rule: str) -> Tensor:
    """``value`` = 1 where x is above (or at) 0, else 0, with a derivative for attacks.

    The width of training is one standard deviation of a normalised activation. It is not in a file, and follows the
    data: w = sqrt(pi / 2) times the mean magnitude of x in the image's channel.

    straight-through: (1 - |x| / w) / w within w, else 0: half of Bi-Real Net's derivative of a sign
    (arXiv:1808.00278). pass-through: 1 / 2w everywhere. smooth: half of `sign_derivative`.
    """
    return _replaced(x, value, _step_derivative(x, rule)) if _recorded(x) else value


@torch.no_grad()
def _step_derivative(x: Tensor, rule: str) -> Tensor:
    if rule == SMOOTH:
        return 0.5 * sign_derivative(x)
    own = tuple(range(2 if x.dim() > 2 else 1, x.dim()))
    width = math.sqrt(math.pi / 2) * (x.abs().mean(dim=own, keepdim=True) if own else x.abs().mean())
    width.clamp_min_(1e-12)
    return (0.5 / width).expand_as(x) if rule == PASS_THROUGH else (1.0 - x.abs() / width).clamp_(min=0.0) / width


def _replaced(x: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
    # Outside of no_grad, which a caller may be in: an autograd function there records nothing.
    with torch.enable_grad():
        answer: Tensor = WithGradient.apply(x, value, factor)
    return answer
