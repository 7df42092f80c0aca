"""TPGD: PGD on the KL divergence from the clean answer; Eq. 4 of the ODG-Q paper.

It is the inner attack of TRADES (Zhang et al. 2019, arXiv:1901.08573).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks.ascent import Model, input_gradient, step_length
from robustq.attacks.ball import LEVEL_TOLERANCE, project, uniform_start
from robustq.attacks.hunt import Hunt
from robustq.attacks.losses import cross_entropy, kl
from robustq.attacks.sign_ascent import sign_ascent
from robustq.attacks.streams import Streams, streams_for
from robustq.errors import UsageError


def tpgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    start: float = 1 / 255,
    rho: float | None = None,
    stop_when_broken: bool = False,
    generator: torch.Generator | Streams | None = None,
) -> Tensor:
    """TPGD: x_{t+1} = project(x_t + step_size * sign(grad_x KL(softmax h(x) || softmax h(x_t)))); returns x_steps.

    h(x) is computed once and held constant; labels are not used. With `rho` the ascended loss is that of Eq. 4a as it
    is printed, CE(h(x_t), y) + KL / rho. (Eq. 4a's second term is the task loss against h(x); with h(x) constant its
    gradient is that of KL.)

    x_0 is uniform in +-start around x (and inside the ball). At x itself KL has its minimum and its gradient is zero,
    so that the first step would follow rounding noise or nothing. Deviation from TRADES: an 8-bit input quantizer
    rounds 95% of its start of 0.001 * N(0, 1) back to x, so the start is at least +-1/255 (half of the pixels then
    change). A pixel with a gradient of exactly zero stays where it is.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels; used with `rho` only.
        epsilon: radius of the ball, 0 to 1.
        step_size: in the unit of the images; epsilon / 4 if not given (the paper: 4/255).
        steps: how many, at least 1 (the paper: 20).
        start: half the width of the random start, 1/255 to 1.
        rho: trade-off of Eq. 4a, positive; None for KL only.
        stop_when_broken: as in `pgd`; which images break uses the labels.
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, start below 1/255 or above 1, rho not positive,
            or a model without a gradient with respect to the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    if not 1.0 - LEVEL_TOLERANCE <= 255.0 * start <= 255.0:
        raise UsageError(f"start is {start}; give 1/255 to 1: an 8-bit input quantizer rounds a smaller one away")
    if rho is not None and not rho > 0.0:
        raise UsageError(f"rho is {rho}; give a positive number, or None for KL alone")
    if stop_when_broken:
        hunt, streams = Hunt(model, x, y), streams_for(generator, x)
        rows = hunt.standing
        near = uniform_start(hunt.x[rows], epsilon=start, generator=streams[rows])
        return sign_ascent(
            hunt,
            project(near, hunt.x[rows], epsilon=epsilon),
            lambda logits, rows: _objective(logits, hunt.clean_logits[rows], y[rows], rho=rho),
            epsilon=epsilon,
            step=step,
            steps=steps,
        )
    with torch.no_grad():
        clean_logits = model(x)
    x_adv = project(uniform_start(x, epsilon=start, generator=generator), x, epsilon=epsilon)
    for _ in range(steps):
        slope = input_gradient(model, x_adv, lambda logits: _objective(logits, clean_logits, y, rho=rho))
        x_adv = project(x_adv + step * slope.gradient.sign(), x, epsilon=epsilon)
    return x_adv


def _objective(logits: Tensor, clean_logits: Tensor, y: Tensor, *, rho: float | None) -> Tensor:
    boundary = kl(logits, clean_logits)
    return boundary if rho is None else cross_entropy(logits, y) + boundary / rho
