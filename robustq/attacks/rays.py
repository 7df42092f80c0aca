"""RayS: a search over sign directions that sees only the model's decisions (Chen & Gu 2020, arXiv:2006.12792)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.ball import project
from robustq.attacks.base import AttackState, Criterion, Model, check_settings, left, misclassified, select

TOLERANCE = 1e-3
"""Width at which the search for a radius ends, in the unit of the images (the authors' code)."""

_FARTHEST = 1.0
"""The largest distance of two images; the radius of a direction without a decision boundary."""


@torch.no_grad()
def rays(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    queries: int = 1000,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
) -> Tensor:
    """RayS: find the direction d of signs in which the decision boundary is nearest; uses no logits and no randomness.

    From d = (1, ..., 1) it flips the signs of one block of pixels after the other: of the whole image, then of its
    halves, quarters and so on. A flip is kept when the boundary is nearer than before: one query at the best radius
    shows that, and a binary search then finds the new radius. If no direction has a boundary, nothing is kept, as in
    the authors' code. An image breaks when a misclassified image within epsilon is met. The last query is the corner of
    the ball in the best direction, which is returned for an image that does not break.

    Args (the others are those of all attacks, see `robustq.attacks`):
        queries: per image; the clean image costs one more.
    """
    check_settings(epsilon=epsilon, queries=queries)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = state.remaining
    ones = torch.ones_like(state.x[rows].flatten(1), dtype=torch.float32)
    farthest = torch.full_like(rows, _FARTHEST, dtype=torch.float32)
    search = _Search(
        rows=rows,
        best=ones,
        tried=ones,
        radius=farthest,
        level=torch.zeros_like(rows),
        block=torch.full_like(rows, -1),
        searching=torch.zeros_like(rows, dtype=torch.bool),
        low=torch.zeros_like(farthest),
        high=farthest,
    )
    for number in range(queries - 1):
        if not len(search.rows):
            return state.x_adv
        search = _query(state, search, number, epsilon=epsilon)
    rows = search.rows
    if len(rows):
        clean = state.x[rows]
        state.record_final(rows, project(clean + epsilon * search.best.view_as(clean), clean, epsilon=epsilon))
    return state.x_adv


@dataclass
class _Search:
    """The images that remain; every field has one entry per image.

    best, tried: (n, D) signs. radius: of the boundary along `best`. level, block: the one of the 2^level blocks that
    `tried` flips, -1 for the first direction. searching: whether the boundary along `tried` is between low and high.
    """

    rows: Tensor
    best: Tensor
    tried: Tensor
    radius: Tensor
    level: Tensor
    block: Tensor
    searching: Tensor
    low: Tensor
    high: Tensor


def _query(state: AttackState, search: _Search, number: int, *, epsilon: float) -> _Search:
    """One query for each image: the next one of its search for a radius, or the first one along a new direction."""
    rows, x = search.rows, state.x[search.rows]
    distance = torch.where(search.searching, (search.low + search.high) / 2, search.radius)
    images = project(x + (distance[:, None] * search.tried).view_as(x), x, epsilon=_FARTHEST)
    logits = state.query(rows, images)
    wrong = misclassified(logits, state.y[rows])
    kept = None
    hit = wrong & (distance <= epsilon)
    if hit.device.type != "cpu" or bool(hit.any()):  # elsewhere a look makes the host wait
        kept = state.record(rows, project(images, x, epsilon=epsilon), logits, among=hit)
    # Along a new direction: farther than the best one, or the start of a search.
    refused = ~search.searching & ~wrong
    search.high = torch.where(wrong, distance, search.high)
    search.low = torch.where(search.searching & ~wrong, distance, torch.where(search.searching, search.low, 0.0))
    search.searching = search.searching | wrong
    found = search.searching & (search.high - search.low < TOLERANCE)
    nearer = found & (search.high < search.radius)
    search.best = torch.where(nearer[:, None], search.tried, search.best)
    search.radius = torch.where(nearer, search.high, search.radius)
    _next_block(search, refused | found)
    return select(search, left(kept, number))


def _next_block(search: _Search, mask: Tensor) -> None:
    """Flip the next block of pixels, or after the last one blocks of half the size, in place; mask (n,) bool."""
    if mask.device.type == "cpu" and not bool(mask.any()):
        return
    pixels = search.best.shape[1]
    deepest = math.ceil(math.log2(max(pixels, 2)))
    ended = (search.block >= 0) & ((search.block + 1) * _block_size(pixels, search.level) >= pixels)
    search.level = torch.where(mask & ended, (search.level + 1).clamp(max=deepest), search.level)
    search.block = torch.where(mask, torch.where(ended, 0, search.block + 1), search.block)
    size = _block_size(pixels, search.level)
    index = torch.arange(pixels, device=search.best.device)
    first = (search.block * size)[:, None]
    flipped = (index >= first) & (index < first + size[:, None])
    tried = torch.where(flipped, -search.best, search.best)
    search.tried = torch.where(mask[:, None], tried, search.tried)
    search.searching = search.searching & ~mask


def _block_size(pixels: int, level: Tensor) -> Tensor:
    return torch.ceil(pixels / 2.0**level).to(torch.int64)
