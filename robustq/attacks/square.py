"""Square Attack: random search with squares of +-epsilon, on logits alone (Andriushchenko et al. 2020, 1912.00049)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.attacks.ball import project
from robustq.attacks.base import AttackState, Criterion, Model, check_settings, left
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import margin, nan_to_lowest

_FIRST_SHARE = 0.8
"""p_init: the share of the image that the first squares cover."""

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries: after these the share of the image that a square covers is halved (section 4 of the paper)."""

_LARGE = 3 * 32 * 32
"""Size of an image (channels x height x width) from which on the squares shrink over 10,000 queries."""


@torch.no_grad()
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    queries: int = 5000,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Square Attack in the L-infinity ball; needs no gradient, so that it can attack the deployed file itself.

    It starts from vertical stripes of +-epsilon, one sign per column and channel. Each step sets a square at a random
    position to x +- epsilon, one sign per channel, and keeps it if the margin rises.

    Deviations from the authors' code: each image has its own squares from its own generator, and a square may also
    touch the last row and column. As in AutoAttack's suite the squares shrink over 10,000 queries, whatever `queries`;
    on images smaller than 3 x 32 x 32 over fewer (`schedule_of`).

    Args (the others are those of all attacks, see `robustq.attacks`):
        queries: per image, stripes included; the clean image costs one more.
    """
    check_settings(epsilon=epsilon, queries=queries)
    schedule = schedule_of(x[0].numel() if len(x) else 1)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = state.remaining
    if not len(rows):
        return state.x_adv
    channels, height, width = x.shape[1:]
    stripes = generators.child("stripes")[rows].signs((channels, 1, width)).to(x)
    best = project(state.x[rows] + epsilon * stripes, state.x[rows], epsilon=epsilon)
    logits = state.query(rows, best)
    highest = nan_to_lowest(margin(logits, y[rows]))
    kept = left(state.record(rows, best, logits), 0)
    if kept is not None:
        rows, best, highest = rows[kept], best[kept], highest[kept]
    for query in range(1, queries):
        if not len(rows):
            break
        side = round(math.sqrt(share(query=query, schedule=schedule) * height * width))
        side = min(max(side, 1), height, width)
        signs, inside = _squares(generators.child("square", query)[rows], side, x)
        clean = state.x[rows]
        x_adv = torch.where(inside, project(clean + epsilon * signs, clean, epsilon=epsilon), best)
        logits = state.query(rows, x_adv)
        margins = nan_to_lowest(margin(logits, y[rows]))
        better = margins > highest
        best = torch.where(better[:, None, None, None], x_adv, best)
        highest = torch.maximum(highest, margins)
        kept = left(state.record(rows, x_adv, logits), query)
        if kept is not None:
            rows, best, highest = rows[kept], best[kept], highest[kept]
    return state.x_adv


def schedule_of(size: int) -> int:
    """The queries over which squares shrink: 10,000 min(1, size / 3072)^(2/3), size = channels x height x width.

    The exponent was measured on images of 64 values, where some 800 queries are best (docs/results/attacks.md).
    """
    return max(round(10_000 * math.pow(min(1.0, size / _LARGE), 2 / 3)), 1)


def share(*, query: int, schedule: int) -> float:
    """The share of the image that a square covers at a query (the stripes are query 0)."""
    of_10_000 = query * 10_000 // schedule
    return _FIRST_SHARE * 0.5 ** sum(of_10_000 > after for after in _HALVED_AFTER)


def _squares(generators: ImageGenerators, side: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """One square per image: its signs (n, C, 1, 1), and the pixels inside it (n, 1, H, W) bool."""
    signs = generators.signs((x.shape[1], 1, 1)).to(x)
    corner = generators.child("place").bits((2,))
    inside = []
    for axis, size in enumerate(x.shape[2:]):
        # 31 random bits scaled to 0 .. size - side.
        first = ((corner[:, axis] >> 33) & 0x7FFFFFFF) * (size - side + 1) >> 31
        first = first[:, None]
        index = torch.arange(size, device=x.device)
        inside.append((index >= first) & (index < first + side))
    return signs, inside[0][:, None, :, None] & inside[1][:, None, None, :]
