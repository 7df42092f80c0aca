"""RayS: a search over sign directions that sees only the model's decisions (Chen & Gu 2020, arXiv:2006.12792)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon, project
from robustq.attacks.base import AttackState, Criterion, Model, misclassified
from robustq.errors import UsageError

TOLERANCE = 1e-3
"""Width at which the search for a radius ends, in the unit of the images (the authors' code)."""

_FARTHEST = 1.0
"""No two pictures are farther apart; a direction without a decision boundary counts as this far."""


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
    """RayS: find the direction d of signs in which the decision boundary is nearest; uses no logits and no gradient.

    From d = (1, ..., 1) it flips the signs of one block of pixels after the other, first of the whole picture, then of
    its halves, quarters and so on. A flip is kept when the boundary is nearer than before: one query at the best radius
    tells, and a binary search then finds the new radius. No randomness. Where no direction that is tried has a boundary
    at all, nothing is kept and the search stays at d with one block flipped, as in the authors' code.

    Images drop out when a misclassified picture within epsilon is met. The last query of an image asks about the corner
    of the ball in its best direction, which is what is returned for an image that stands.

    Args:
        model: images -> logits, of which only the highest counts.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        queries: per image that stands, at least 1; the clean image is asked about once more.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met.

    Raises:
        UsageError: epsilon outside [0, 1], queries below 1, or a model with fewer than two classes.
    """
    with torch.no_grad():
        check_epsilon(epsilon)
        if queries < 1:
            raise UsageError(f"queries is {queries}; give at least 1")
        hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
        search = _Search.begin(hunt.standing, x[0].numel() if len(x) else 0)
        for _ in range(queries - 1):
            if not len(search.rows):
                return hunt.x_adv
            search = _ask(hunt, search, epsilon=epsilon)
        rows = search.rows
        if len(rows):
            corner = project(hunt.x[rows] + epsilon * search.best.view_as(hunt.x[rows]), hunt.x[rows], epsilon=epsilon)
            hunt.settle(rows, corner, hunt.ask(rows, corner))
        return hunt.x_adv


@dataclass
class _Search:
    """The images that stand; every field has one entry per image.

    best, tried: (n, D) signs. radius: of the boundary along `best`. level, block: which of the 2^level blocks `tried`
    flips, -1 for the first direction itself. searching: whether the boundary along `tried` is between low and high.
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

    @classmethod
    def begin(cls, rows: Tensor, pixels: int) -> _Search:
        ones = torch.ones(len(rows), pixels, device=rows.device)
        numbers = torch.zeros(len(rows), device=rows.device)
        return cls(
            rows=rows,
            best=ones,
            tried=ones.clone(),
            radius=numbers + _FARTHEST,
            level=torch.zeros_like(rows),
            block=torch.zeros_like(rows) - 1,
            searching=torch.zeros_like(rows, dtype=torch.bool),
            low=numbers.clone(),
            high=numbers + _FARTHEST,
        )

    def keep(self, which: Tensor) -> _Search:
        return self if bool(which.all()) else _Search(*(getattr(self, field.name)[which] for field in fields(self)))


def _ask(hunt: AttackState, search: _Search, *, epsilon: float) -> _Search:
    """One query for each image: the next one of its search for a radius, or the first one along a new direction."""
    rows, x = search.rows, hunt.x[search.rows]
    distance = torch.where(search.searching, (search.low + search.high) / 2, search.radius)
    # The ball of float32 epsilon itself is inside: the distance at the end of a search may be exactly epsilon.
    pictures = project(x + (distance[:, None] * search.tried).view_as(x), x, epsilon=_FARTHEST)
    logits = hunt.ask(rows, pictures)
    wrong = misclassified(logits, hunt.y[rows])
    goes_on = torch.ones_like(wrong)
    hit = wrong & (distance <= epsilon)
    if bool(hit.any()):
        inside = project(pictures[hit], x[hit], epsilon=epsilon)
        goes_on[hit] = hunt.offer(rows[hit], inside, logits[hit])
    # Along a new direction: farther than the best one, or the start of a search.
    refused = ~search.searching & ~wrong
    search.high = torch.where(wrong, distance, search.high)
    search.low = torch.where(search.searching & ~wrong, distance, torch.where(search.searching, search.low, 0.0))
    search.searching = search.searching | wrong
    found = search.searching & (search.high - search.low < TOLERANCE)
    nearer = found & (search.high < search.radius)
    # The first direction counts as the best one even where no boundary was found along it.
    search.best = torch.where(nearer[:, None], search.tried, search.best)
    search.radius = torch.where(nearer, search.high, search.radius)
    _next_block(search, refused | found)
    return search.keep(goes_on)


def _next_block(search: _Search, which: Tensor) -> None:
    """Go on to the next block of pixels to flip, and after the last one to blocks of half the size, in place."""
    if not bool(which.any()):
        return
    pixels = search.best.shape[1]
    deepest = math.ceil(math.log2(max(pixels, 2)))
    ended = (search.block >= 0) & ((search.block + 1) * _block_size(pixels, search.level) >= pixels)
    search.level = torch.where(which & ended, (search.level + 1).clamp(max=deepest), search.level)
    search.block = torch.where(which, torch.where(ended, 0, search.block + 1), search.block)
    size = _block_size(pixels, search.level)
    index = torch.arange(pixels, device=search.best.device)
    first = (search.block * size)[:, None]
    flipped = (index >= first) & (index < first + size[:, None])
    tried = torch.where(flipped, -search.best, search.best)
    search.tried = torch.where(which[:, None], tried, search.tried)
    search.searching = search.searching & ~which


def _block_size(pixels: int, level: Tensor) -> Tensor:
    return torch.ceil(pixels / 2.0**level).to(torch.int64)
