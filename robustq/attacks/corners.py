"""Random corners of the ball: the cheapest search, which no masked gradient can mislead."""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks.ascent import Model
from robustq.attacks.ball import check_epsilon, project
from robustq.attacks.hunt import Criterion, Hunt
from robustq.attacks.streams import Streams, streams_for
from robustq.errors import UsageError


@torch.no_grad()
def random_corners(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    corners: int = 20,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | Streams | None = None,
) -> Tensor:
    """Ask the model about x +- epsilon with random signs per pixel, clamped to [0, 1]; needs no gradient.

    A linear model is worst at a corner, so that noise from the inside of the ball underrates even random search.

    Args:
        model: images -> logits.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        corners: how many, at least 1; each costs one forward pass of an image that stands, and the attack one more.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`hunt.Criterion`).
        generator: a CPU generator, or streams.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon outside [0, 1], corners below 1, or a model with fewer than two classes.
    """
    check_epsilon(epsilon)
    if corners < 1:
        raise UsageError(f"corners is {corners}; give at least 1")
    streams = streams_for(generator, x)
    hunt = Hunt(model, x, y, criterion=criterion, stop=stop_when_broken)
    for corner in range(corners):
        rows = hunt.standing
        if not len(rows):
            break
        signs = streams.child("corner", corner)[rows].signs(tuple(x.shape[1:])).to(x)
        x_adv = project(hunt.x[rows] + epsilon * signs, hunt.x[rows], epsilon=epsilon)
        hunt.offer(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv
