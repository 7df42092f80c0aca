"""The loop of PGD's family for a hunt: steps along the gradient's sign for the images that still stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from robustq.attacks.ascent import input_gradient
from robustq.attacks.ball import project
from robustq.attacks.hunt import Hunt

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, K), their rows in the batch (n,) int64) -> losses (n,), one per image."""


def sign_ascent(hunt: Hunt, start: Tensor, objective: Objective, *, epsilon: float, step: float, steps: int) -> Tensor:
    """x_{t+1} = project(x_t + step * sign(grad_x objective(h(x_t)))); every point of the way, the start and the end
    included, is offered to the hunt.

    Args:
        hunt: the batch under attack; images that leave it cost nothing more.
        start: (n, C, H, W), a point of the ball for each image of `hunt.standing`.
        objective: what is ascended.
        epsilon: radius of the ball, 0 to 1.
        step: in the unit of the images.
        steps: how many, at least 1.

    Returns:
        (N, C, H, W): per image of the whole batch what the hunt holds.

    Raises:
        UsageError: a model without a gradient with respect to the images.
    """
    rows, x_adv = hunt.standing, start
    for _ in range(steps):
        if not len(rows):
            return hunt.x_adv
        slope = input_gradient(hunt.model_for(rows), x_adv, partial(_of_rows, objective=objective, rows=rows))
        goes_on = hunt.offer(rows, x_adv, slope.logits)
        rows = rows[goes_on]
        x_adv = x_adv[goes_on] + step * slope.gradient[goes_on].sign()
        x_adv = project(x_adv, hunt.x[rows], epsilon=epsilon)
    if len(rows):
        hunt.offer(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv


def _of_rows(logits: Tensor, *, objective: Objective, rows: Tensor) -> Tensor:
    return objective(logits, rows)
