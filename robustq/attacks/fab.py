"""FAB: walk along the decision boundary towards the clean image (Croce & Hein 2020, arXiv:1907.02044), L-infinity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustq.attacks.ball import project, uniform_noise_and_peak
from robustq.attacks.base import (
    AttackState,
    Criterion,
    Model,
    check_settings,
    input_gradient,
    input_gradients,
    left,
    likely_targets,
    misclassified,
    replace_rows,
)
from robustq.attacks.counted import model_for
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import targeted_margin

LARGEST_BIAS = 0.1
"""alpha_max: the largest weight of the clean image in a step."""
OVERSHOOT = 1.05
"""eta: the length of a step relative to the linearised boundary."""
STEP_BACK = 0.9
"""beta: the share of its distance from the clean image that a misclassified point keeps."""


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
    that boundary (within [0, 1]), and goes to a mean of the two. A misclassified point goes a tenth of its way back. An
    image breaks when a misclassified point within epsilon is met. The first run starts at the image, later ones at
    random points around it. An image that does not break gets the nearest misclassified point, projected into the ball.

    Args (the others are those of all attacks, see `robustq.attacks`):
        steps: per run; each costs a forward pass with a backward pass for every class, and a forward pass.
        restarts: number of runs.
    """
    check_settings(epsilon=epsilon, steps=steps, restarts=restarts)
    generators = image_generators(generator, x)
    walk = _Walk(model, x, y, criterion=criterion, stop=stop_when_broken)
    for restart in range(restarts):
        start = generators.child("fab", restart) if restart else None
        _run(walk, partial(_nearest_boundary, walk), start, epsilon=epsilon, steps=steps)
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

    A step costs one backward pass for any number of classes. An image breaks when any class beats its label.

    Args (the others as for `fab`):
        target_classes: number of targets; at most the number of other classes.
        restarts: runs for each target.
    """
    check_settings(epsilon=epsilon, steps=steps, restarts=restarts, target_classes=target_classes)
    generators = image_generators(generator, x)
    walk = _Walk(model, x, y, criterion=criterion, stop=stop_when_broken)
    for rank, target in enumerate(likely_targets(walk.clean_logits, y, count=target_classes, generators=generators)):
        for restart in range(restarts):
            start = generators.child("fab", rank, restart) if restart else None
            _run(walk, partial(_boundary_to, target, walk), start, epsilon=epsilon, steps=steps)
    return _result(walk, epsilon=epsilon)


@torch.no_grad()
def onto_plane(points: Tensor, normal: Tensor, value: Tensor) -> Tensor:
    """Minimise ||d||_inf subject to value + <normal, d> = 0 and points + d in [0, 1] (arXiv:1907.02044, Eq. 6).

    With radius r the best change moves every coordinate towards the plane by r, or by its room. That makes up
    sum_i |normal_i| min(r, room_i), which is piecewise linear and growing in r: sorting the rooms gives r exactly.

    Points in [0, 1] and normal are (n, D), the value of the affine function at the points (n,). Returns d (n, D): zero
    where the normal is zero; where the plane does not meet the cube, the change to the corner whose affine value is
    nearest to 0.
    """
    towards = -value.sign()[:, None] * normal.sign()
    room = torch.where(towards > 0, 1.0 - points, points)
    weight = normal.abs()
    sorted_room, order = room.sort(dim=1)
    sorted_weight = weight.gather(1, order)
    # The contribution of coordinates with less room, and the weight of the others.
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


class _Walk(AttackState):
    """The attack state, each image's nearest misclassified point (N, C, H, W), and its distance (N,), inf for none."""

    def __init__(self, model: Model, x: Tensor, y: Tensor, *, criterion: Criterion | None, stop: bool) -> None:
        super().__init__(model, x, y, criterion=criterion, stop=stop)
        self.nearest = self.x.clone()
        self.distance = torch.full((len(x),), torch.inf, device=x.device)


Boundary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points (n, C, H, W), rows (n,)) -> the lead of another class (n,), and its gradient (n, D)."""


def _boundary_to(target: Tensor, walk: _Walk, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    lead = partial(targeted_margin, y=walk.y[rows], target=target[rows])
    gradient, losses, _ = input_gradient(model_for(walk.model, rows), points, lead)
    return losses, gradient.flatten(1)


def _nearest_boundary(walk: _Walk, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the class whose linearised boundary is nearest in L-infinity, |lead| / ||gradient||_1."""
    labels = walk.y[rows]
    classes = range(walk.clean_logits.shape[1])
    leads = [partial(targeted_margin, y=labels, target=torch.full_like(labels, number)) for number in classes]
    shortest = torch.full((len(rows),), torch.inf, device=points.device)
    value, normal = torch.zeros(len(rows), device=points.device), torch.zeros_like(points.flatten(1))
    for number, found in enumerate(input_gradients(model_for(walk.model, rows), points, leads)):
        gradient = found.gradient.flatten(1)
        distance = found.losses.abs() / (gradient.abs().sum(dim=1) + 1e-12)
        nearer = (distance < shortest) & (labels != number)
        shortest = torch.where(nearer, distance, shortest)
        value = torch.where(nearer, found.losses.to(value), value)
        normal = torch.where(nearer[:, None], gradient, normal)
    return value, normal


def _run(walk: _Walk, boundary: Boundary, start: ImageGenerators | None, *, epsilon: float, steps: int) -> None:
    rows = walk.remaining
    points = walk.x[rows]
    if start is not None:
        noise, peak = uniform_noise_and_peak(points, start[rows])
        radius = walk.distance[rows].clamp(max=epsilon) / 2
        points = (points + radius[:, None, None, None] / peak * noise).clamp(0.0, 1.0)
    for number in range(steps):
        if not len(rows):
            return
        value, normal = boundary(points, rows)
        points = _mean_of_projections(points, walk.x[rows], value.to(points), normal)
        rows, points = _evaluate(walk, rows, points, number, epsilon=epsilon)


@torch.no_grad()
def _mean_of_projections(points: Tensor, x: Tensor, value: Tensor, normal: Tensor) -> Tensor:
    """The next points: eta times the way to the linearised boundary, with weight alpha from the clean image."""
    point, clean = points.flatten(1), x.flatten(1)
    value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    from_point = onto_plane(point, normal, value)
    from_clean = onto_plane(clean, normal, value + (normal * (clean - point)).sum(dim=1))
    far, near = (change.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) for change in (from_point, from_clean))
    alpha = (far / (far + near)).clamp(max=LARGEST_BIAS)
    mean = (1.0 - alpha) * (point + OVERSHOOT * from_point) + alpha * (clean + OVERSHOOT * from_clean)
    return mean.clamp(0.0, 1.0).view_as(points)


@torch.no_grad()
def _evaluate(walk: _Walk, rows: Tensor, points: Tensor, number: int, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """Query the model, record misclassified points and step back from them; returns the rows and points that remain."""
    logits = walk.query(rows, points)
    wrong = misclassified(logits, walk.y[rows])
    if wrong.device.type == "cpu" and not bool(wrong.any()):  # elsewhere a look makes the host wait
        return rows, points
    x = walk.x[rows]
    distance = (points - x).abs().flatten(1).amax(dim=1)
    nearer = wrong & (distance < walk.distance[rows])
    replace_rows(walk.nearest, rows, points, nearer)
    replace_rows(walk.distance, rows, distance, nearer)
    inside = wrong & (distance <= epsilon)
    kept = left(walk.record(rows, project(points, x, epsilon=epsilon), logits, among=inside), number)
    points = torch.where(wrong[:, None, None, None], x + STEP_BACK * (points - x), points)
    return (rows, points) if kept is None else (rows[kept], points[kept])


@torch.no_grad()
def _result(walk: _Walk, *, epsilon: float) -> Tensor:
    rows = walk.remaining
    rows = rows[(~walk.broken[rows] & walk.distance[rows].isfinite()).nonzero()[:, 0]]
    if len(rows):
        walk.record_final(rows, project(walk.nearest[rows], walk.x[rows], epsilon=epsilon))
    return walk.x_adv
