"""Square Attack: random search with squares of +-epsilon, on logits alone (Andriushchenko et al. 2020, 1912.00049)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon, project
from robustq.attacks.base import AttackState, Criterion, Model
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import margin
from robustq.errors import UsageError

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries: where the share of the picture that a square covers is halved (section 4 of the paper)."""

_LARGE = 3 * 32 * 32
"""Values of a picture from which on the squares shrink over 10,000 queries."""


@torch.no_grad()
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    queries: int = 5000,
    p_init: float = 0.8,
    schedule: int | None = None,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Square Attack in the L-infinity ball; needs no gradient, so that the deployed file itself can be attacked.

    It starts from vertical stripes of +-epsilon, one sign per column and channel. Each step sets a square at a random
    place to x +- epsilon, one sign per channel, and keeps it if the margin rises. The squares' share of the picture
    starts at p_init and is halved along the paper's schedule.

    Deviations from the authors' code: each image has its own squares, from its own random stream, and a square may also
    touch the last row and column. The schedule is over 10,000 queries however many there are, as in AutoAttack's suite,
    for pictures of 3 x 32 x 32 values and more; smaller ones are searched through sooner, and get a shorter schedule
    (`schedule_of`).

    Args:
        model: images -> logits.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        queries: per image that stands, at least 1, stripes included; the clean image is asked about once more.
        p_init: share of the picture that the first squares cover, above 0 and up to 1.
        schedule: over how many queries the squares shrink to their smallest, at least 1; None: what fits the pictures.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon outside [0, 1], queries below 1, p_init outside (0, 1], or a model with fewer than two
            classes.
    """
    check_epsilon(epsilon)
    if queries < 1:
        raise UsageError(f"queries is {queries}; give at least 1")
    if not 0.0 < p_init <= 1.0:
        raise UsageError(f"p_init is {p_init}; give a share of the picture above 0 and up to 1, like 0.8")
    schedule = schedule_of(x[0].numel() if len(x) else 1) if schedule is None else schedule
    if schedule < 1:
        raise UsageError(f"schedule is {schedule}; give a number of queries, or None for what fits the pictures")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = hunt.standing
    if not len(rows):
        return hunt.x_adv
    channels, height, width = x.shape[1:]
    stripes = streams.child("stripes")[rows].signs((channels, 1, width)).to(x)
    best = project(hunt.x[rows] + epsilon * stripes, hunt.x[rows], epsilon=epsilon)
    logits = hunt.ask(rows, best)
    highest = _margin(logits, y[rows])
    goes_on = hunt.offer(rows, best, logits)
    rows, best, highest = rows[goes_on], best[goes_on], highest[goes_on]
    for query in range(1, queries):
        if not len(rows):
            break
        side = _side(p_init, query=query, schedule=schedule, height=height, width=width)
        patch, inside = _squares(streams.child("square", query)[rows], side, tuple(x.shape[1:]), x)
        clean = hunt.x[rows]
        x_adv = torch.where(inside, project(clean + epsilon * patch, clean, epsilon=epsilon), best)
        logits = hunt.ask(rows, x_adv)
        margins = _margin(logits, y[rows])
        better = margins > highest
        best = torch.where(better[:, None, None, None], x_adv, best)
        highest = torch.maximum(highest, margins)
        goes_on = hunt.offer(rows, x_adv, logits)
        if not bool(goes_on.all()):
            rows, best, highest = rows[goes_on], best[goes_on], highest[goes_on]
    return hunt.x_adv


def schedule_of(values: int) -> int:
    """The queries over which squares shrink, 10,000 min(1, values / 3072)^(2/3).

    The exponent was measured on pictures of 64 values, where some 800 queries are best at every budget from 200 to
    1,000, and 10,000 leave far more images than with a longer search (docs/results/attacks.md).

    Args:
        values: channels times height times width.
    """
    return max(round(10_000 * math.pow(min(1.0, values / _LARGE), 2 / 3)), 1)


def share(p_init: float, *, query: int, schedule: int) -> float:
    """The share of the picture that a square covers at a query (the stripes are query 0)."""
    place = query * 10_000 // schedule
    return p_init * 0.5 ** sum(place > after for after in _HALVED_AFTER)


def _side(p_init: float, *, query: int, schedule: int, height: int, width: int) -> int:
    wanted = round(math.sqrt(share(p_init, query=query, schedule=schedule) * height * width))
    return min(max(wanted, 1), height, width)


def _squares(streams: ImageGenerators, side: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """One square per image: its signs (n, C, 1, 1), and where it is (n, 1, H, W) bool."""
    channels, height, width = shape
    signs = streams.signs((channels, 1, 1)).to(like)
    places = streams.child("place").bits((2,))
    inside = None
    for axis, size in enumerate((height, width)):
        # 31 random bits scaled to 0 .. size - side.
        first = ((places[:, axis] >> 33) & 0x7FFFFFFF) * (size - side + 1) >> 31
        first = first.to(like.device)[:, None]
        index = torch.arange(size, device=like.device)
        within = (index >= first) & (index < first + side)
        within = within[:, None, :, None] if axis == 0 else within[:, None, None, :]
        inside = within if inside is None else inside & within
    assert inside is not None
    return signs, inside


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin; a NaN counts as the lowest, since nothing would ever be higher than it."""
    return margin(logits, y).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
