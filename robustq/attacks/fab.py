"""FAB.

The smallest L-infinity change that brings a picture onto a hyperplane without leaving [0, 1].

FAB: walk along the decision boundary towards the clean image (Croce & Hein 2020, arXiv:1907.02044), L-infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustq.attacks.apgd import likely_targets
from robustq.attacks.ball import project
from robustq.attacks.base import (
    AttackState,
    Criterion,
    Model,
    input_gradient,
    input_gradients,
    misclassified,
    step_length,
)
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import targeted_margin
from robustq.errors import UsageError


@torch.no_grad()
def onto_plane(points: Tensor, normal: Tensor, value: Tensor) -> Tensor:
    """Minimise ||d||_inf subject to value + <normal, d> = 0 and points + d in [0, 1] (arXiv:1907.02044, Eq. 6).

    With radius r the best change moves every coordinate towards the plane by r, or by the room it has, which makes up
    sum_i |normal_i| min(r, room_i): piecewise linear and growing in r, so that sorting the rooms gives r exactly.

    Args:
        points: (n, D) float in [0, 1].
        normal: (n, D) float.
        value: (n,) float, of the affine function at the points.

    Returns:
        (n, D): d; where the plane does not meet the cube, the change to the corner nearest to it in the sense of the
        affine function. Zero where the normal is zero.
    """
    towards = -value.sign()[:, None] * normal.sign()
    room = torch.where(towards > 0, 1.0 - points, points)
    weight = normal.abs()
    sorted_room, order = room.sort(dim=1)
    sorted_weight = weight.gather(1, order)
    # What coordinates with less room contribute, and the weight of the others.
    filled = (sorted_weight * sorted_room).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(filled[:, :1]), filled[:, :-1]], dim=1)
    open_weight = sorted_weight.flip(1).cumsum(dim=1).flip(1)
    reached = before + sorted_room * open_weight
    wanted = value.abs()[:, None]
    first = (reached >= wanted).to(torch.int8).argmax(dim=1, keepdim=True)
    enough = (reached >= wanted).any(dim=1, keepdim=True)
    radius = (wanted - before.gather(1, first)) / open_weight.gather(1, first).clamp(min=1e-30)
    radius = torch.where(enough, radius, sorted_room[:, -1:]).clamp(min=0.0)
    return towards * torch.minimum(radius, room)


LARGEST_BIAS = 0.1
"""alpha_max: how much a step may be drawn towards the clean image."""
OVERSHOOT = 1.05
"""eta: how far beyond the linearised boundary a step goes."""
STEP_BACK = 0.9
"""beta: the share of its way that a misclassified point keeps, towards the clean image."""


def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    restarts: int = 1,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """FAB towards the nearest class: a small misclassified change, rather than the worst one of a given size.

    Each step takes the class whose linearised boundary is nearest, projects the current point and the clean image onto
    that boundary (within [0, 1]), and goes to a mean of the two, drawn towards the clean image. A misclassified point
    goes a tenth of its way back. An image is broken when a misclassified point within epsilon is met. The first run
    starts at the image, the others at random points around it.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        steps: per run, at least 1; each costs a forward pass with a backward pass for every class, and a forward pass.
        restarts: how many runs, at least 1.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams, for the starts of the runs after the first.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met; else the nearest
        misclassified one that was met, projected into the ball.

    Raises:
        UsageError: epsilon outside [0, 1], steps or restarts below 1, a model with fewer than two classes, or without a
            gradient with respect to the images.
    """
    _check(epsilon=epsilon, steps=steps, runs=restarts, what="restarts")
    streams = image_generators(generator, x)
    walk = _Walk.begin(AttackState(model, x, y, criterion=criterion, stop=stop_when_broken))
    for restart in range(restarts):
        start = streams.child("fab", restart) if restart else None
        _run(walk, partial(_nearest_boundary, hunt=walk.hunt), start, epsilon=epsilon, steps=steps)
    return _result(walk, epsilon=epsilon)


def fab_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    target_classes: int = 9,
    restarts: int = 1,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """FAB with the boundary towards one class after the other, the highest of the clean logits first (FAB-T).

    One backward pass a step, however many classes there are. Any other class than the label counts as broken.

    Args, result and errors are those of `fab`, but for:

    Args:
        target_classes: how many classes, at least 1; as many as there are others, if there are fewer.
        restarts: runs for each class, at least 1.
    """
    _check(epsilon=epsilon, steps=steps, runs=restarts, what="restarts")
    _check(epsilon=epsilon, steps=steps, runs=target_classes, what="target_classes")
    streams = image_generators(generator, x)
    walk = _Walk.begin(AttackState(model, x, y, criterion=criterion, stop=stop_when_broken))
    for rank, target in enumerate(likely_targets(walk.hunt.clean_logits, y, count=target_classes)):
        for restart in range(restarts):
            start = streams.child("fab", rank, restart) if restart else None
            _run(walk, partial(_boundary_to, target, hunt=walk.hunt), start, epsilon=epsilon, steps=steps)
    return _result(walk, epsilon=epsilon)


@dataclass
class _Walk:
    """A hunt, the nearest misclassified picture of each image (N, C, H, W), and its distance (N,), inf for none."""

    hunt: AttackState
    nearest: Tensor
    distance: Tensor

    @classmethod
    def begin(cls, hunt: AttackState) -> _Walk:
        return cls(hunt, hunt.x.clone(), torch.full((len(hunt.x),), torch.inf, device=hunt.x.device))


Boundary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pictures (n, C, H, W), rows (n,)) -> how much another class leads (n,), and its gradient (n, D)."""


def _boundary_to(target: Tensor, pictures: Tensor, rows: Tensor, *, hunt: AttackState) -> tuple[Tensor, Tensor]:
    lead = partial(targeted_margin, y=hunt.y[rows], target=target[rows])
    slope = input_gradient(hunt.model_for(rows), pictures, lead)
    return slope.losses, slope.gradient.flatten(1)


def _nearest_boundary(pictures: Tensor, rows: Tensor, *, hunt: AttackState) -> tuple[Tensor, Tensor]:
    """That of the class whose linearised boundary is nearest in L-infinity, |lead| / ||gradient||_1."""
    labels = hunt.y[rows]
    classes = range(hunt.clean_logits.shape[1])
    leads = [partial(targeted_margin, y=labels, target=torch.full_like(labels, number)) for number in classes]
    shortest = torch.full((len(rows),), torch.inf, device=pictures.device)
    value, plane = torch.zeros(len(rows), device=pictures.device), torch.zeros_like(pictures.flatten(1))
    for number, slope in enumerate(input_gradients(hunt.model_for(rows), pictures, leads)):
        gradient = slope.gradient.flatten(1)
        distance = slope.losses.abs() / (gradient.abs().sum(dim=1) + 1e-12)
        nearer = (distance < shortest) & (labels != number)
        shortest = torch.where(nearer, distance, shortest)
        value = torch.where(nearer, slope.losses.to(value), value)
        plane = torch.where(nearer[:, None], gradient, plane)
    return value, plane


def _run(walk: _Walk, boundary: Boundary, start: ImageGenerators | None, *, epsilon: float, steps: int) -> None:
    hunt = walk.hunt
    rows = hunt.standing
    if not len(rows):
        return
    now = hunt.x[rows]
    if start is not None:
        now = _around(now, start[rows], radius=walk.distance[rows].clamp(max=epsilon) / 2)
    for _ in range(steps):
        if not len(rows):
            return
        value, plane = boundary(now, rows)
        now = _mean_of_projections(now, hunt.x[rows], value.to(now), plane)
        rows, now = _judge(walk, rows, now, epsilon=epsilon)


def _around(x: Tensor, streams: ImageGenerators, *, radius: Tensor) -> Tensor:
    noise = (2.0 * streams.uniform(tuple(x.shape[1:])) - 1.0).to(x)
    largest = noise.flatten(1).abs().amax(dim=1).clamp(min=1e-12)
    return (x + (radius / largest)[:, None, None, None] * noise).clamp(0.0, 1.0)


@torch.no_grad()
def _mean_of_projections(now: Tensor, x: Tensor, value: Tensor, plane: Tensor) -> Tensor:
    """The next point: eta times beyond the linearised boundary, alpha of it seen from the clean image."""
    point, clean = now.flatten(1), x.flatten(1)
    value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    from_point = onto_plane(point, plane, value)
    from_clean = onto_plane(clean, plane, value + (plane * (clean - point)).sum(dim=1))
    far, near = (change.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) for change in (from_point, from_clean))
    alpha = (far / (far + near)).clamp(max=LARGEST_BIAS)
    mean = (1.0 - alpha) * (point + OVERSHOOT * from_point) + alpha * (clean + OVERSHOOT * from_clean)
    return mean.clamp(0.0, 1.0).view_as(now)


@torch.no_grad()
def _judge(walk: _Walk, rows: Tensor, now: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """Ask about the points, note what is misclassified, and step back from there; returns what the run goes on with."""
    hunt = walk.hunt
    logits = hunt.ask(rows, now)
    wrong = misclassified(logits, hunt.y[rows])
    if not bool(wrong.any()):
        return rows, now
    x = hunt.x[rows]
    distance = (now - x).abs().flatten(1).amax(dim=1)
    nearer = wrong & (distance < walk.distance[rows])
    walk.nearest[rows[nearer]] = now[nearer]
    walk.distance[rows[nearer]] = distance[nearer]
    goes_on = torch.ones_like(wrong)
    inside = wrong & (distance <= epsilon)
    if bool(inside.any()):
        found = project(now[inside], x[inside], epsilon=epsilon)
        goes_on[inside] = hunt.offer(rows[inside], found, logits[inside])
    now = torch.where(wrong[:, None, None, None], x + STEP_BACK * (now - x), now)
    return rows[goes_on], now[goes_on]


@torch.no_grad()
def _result(walk: _Walk, *, epsilon: float) -> Tensor:
    hunt = walk.hunt
    rows = hunt.standing[~hunt.broken[hunt.standing] & walk.distance[hunt.standing].isfinite()]
    if len(rows):
        x_adv = project(walk.nearest[rows], hunt.x[rows], epsilon=epsilon)
        hunt.settle(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv


def _check(*, epsilon: float, steps: int, runs: int, what: str) -> None:
    step_length(None, epsilon=epsilon, steps=steps)
    if runs < 1:
        raise UsageError(f"{what} is {runs}; give at least 1")
