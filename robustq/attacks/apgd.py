"""Auto-PGD: PGD that chooses its step sizes itself (Croce & Hein 2020, arXiv:2003.01690, section 3 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robustq.attacks.ball import project
from robustq.attacks.base import AttackState, Criterion, Model, input_gradient, step_length
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import Loss, TargetedLoss, cross_entropy, targeted_dlr
from robustq.errors import UsageError

MOMENTUM = 0.75
ENOUGH_INCREASES = 0.75
"""rho: the share of the steps between two checkpoints that must have raised the loss for the step size to stay."""


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    loss: Loss = cross_entropy,
    restarts: int = 1,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """APGD on any loss: sign ascent with momentum whose step size, 2 epsilon at first, is halved at checkpoints.

    z = project(x_t + step * sign(grad)); x_{t+1} = project(x_t + 0.75 (z - x_t) + 0.25 (x_t - x_{t-1})). At a
    checkpoint (after 22% of the steps, then at distances that shrink by 3% down to 6%) an image's step is halved and it
    goes back to its best point, if fewer than 75% of the steps since the last one raised the loss, or if neither the
    step nor the highest loss have changed since. Each run starts at a random point that touches the ball's edge: noise,
    uniform in the ball, divided by its largest pixel.

    Images that the model misclassifies are returned as they are. The others are dropped as they break (`AttackState`).

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        steps: per run, at least 1; each costs a forward and a backward pass of an image that stands, and the run one
            forward pass more.
        loss: `losses.cross_entropy`, `margin` or `dlr`, or any function of that type.
        restarts: how many runs, at least 1; each attacks what the ones before left.
        stop_when_broken: drop images from the batch when they break. Which images break does not change by it;
            without it every image gets all steps and the picture with the highest margin.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams, for the starts.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon outside [0, 1], steps or restarts below 1, a model with fewer than two classes, or without a
            gradient with respect to the images.
    """
    _check(epsilon=epsilon, steps=steps, runs=restarts, what="restarts")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for restart in range(restarts):
        start = streams.child("apgd", restart)
        _run(hunt, lambda logits, rows: loss(logits, y[rows]), start, epsilon=epsilon, steps=steps)
    return hunt.x_adv


def apgd_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    loss: TargetedLoss = targeted_dlr,
    target_classes: int = 9,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """APGD towards one class after the other, the highest of the clean logits first (APGD-T of AutoAttack).

    An image counts as broken when any class beats its label, the targeted one or not.

    Args, result and errors are those of `apgd`, but for:

    Args:
        loss: `losses.targeted_dlr` or `targeted_margin`, or any function of that type.
        target_classes: how many runs, each towards another class, at least 1; as many as there are other classes, if
            there are fewer.
    """
    _check(epsilon=epsilon, steps=steps, runs=target_classes, what="target_classes")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for rank, target in enumerate(likely_targets(hunt.clean_logits, y, count=target_classes)):
        start = streams.child("apgd", rank)

        def towards(logits: Tensor, rows: Tensor, target: Tensor = target) -> Tensor:
            return loss(logits, y[rows], target[rows])

        _run(hunt, towards, start, epsilon=epsilon, steps=steps)
    return hunt.x_adv


def likely_targets(clean_logits: Tensor, y: Tensor, *, count: int) -> list[Tensor]:
    """The classes of the highest logits but the label's, highest first.

    Args:
        clean_logits: (N, K).
        y: (N,) int64.
        count: at most so many; there are K - 1.

    Returns:
        A list of (N,) int64.
    """
    others = clean_logits.nan_to_num(nan=0.0).scatter(1, y[:, None], -torch.inf)
    # Stable, so that equal logits are tried in the order of their classes on every device.
    order = others.sort(dim=1, descending=True, stable=True).indices
    # The label is last unless another logit is -inf as well.
    order = order[order != y[:, None]].view(len(y), -1)
    return list(order[:, :count].unbind(dim=1))


def checkpoints(steps: int) -> frozenset[int]:
    """The steps after which step sizes are looked at: w_j = ceil(p_j * steps).

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    found, place, distance = set(), 22, 22  # in hundredths, so that no rounding moves a ceil
    while place < 100:
        found.add(-(-place * steps // 100))
        distance = max(distance - 3, 6)
        place += distance
    return frozenset(found)


@dataclass
class _Climb:
    """The images of a run that still stand; every field has one entry per image."""

    rows: Tensor
    x: Tensor
    x_adv: Tensor
    previous: Tensor
    gradient: Tensor
    losses: Tensor
    step: Tensor
    best: Tensor
    best_gradient: Tensor
    best_losses: Tensor
    increases: Tensor
    best_at_check: Tensor
    halved_at_check: Tensor

    def keep(self, which: Tensor) -> _Climb:
        """The climb of some of its images: which (n,) bool."""
        if bool(which.all()):
            return self
        return _Climb(*(getattr(self, field.name)[which] for field in fields(self)))


Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, K), rows of the batch (n,)) -> losses (n,)."""


def _run(hunt: AttackState, objective: Objective, streams: ImageGenerators, *, epsilon: float, steps: int) -> None:
    rows = hunt.standing
    if not len(rows):
        return
    x = hunt.x[rows]
    noise = (2.0 * streams[rows].uniform(tuple(x.shape[1:])) - 1.0).to(x)
    largest = noise.flatten(1).abs().amax(dim=1).clamp(min=1e-12)
    x_adv = project(x + epsilon * noise / largest[:, None, None, None], x, epsilon=epsilon)
    climb = _begin(hunt, objective, rows, x, x_adv, epsilon=epsilon)
    checks, last_check = checkpoints(steps), 0
    for number in range(1, steps + 1):
        if not len(climb.rows):
            return
        _step(climb, epsilon=epsilon, momentum=MOMENTUM if number > 1 else 1.0)
        climb = _look(hunt, objective, climb, with_gradient=number < steps)
        if number in checks:
            _check_step_sizes(climb, interval=number - last_check)
            last_check = number


def _begin(
    hunt: AttackState, objective: Objective, rows: Tensor, x: Tensor, x_adv: Tensor, *, epsilon: float
) -> _Climb:
    slope = input_gradient(hunt.model_for(rows), x_adv, lambda logits: objective(logits, rows))
    losses = _comparable(slope.losses)
    nothing = torch.zeros_like(losses)
    climb = _Climb(
        rows=rows,
        x=x,
        x_adv=x_adv,
        previous=x_adv,
        gradient=slope.gradient,
        losses=losses,
        step=torch.full_like(losses, 2.0 * epsilon, dtype=x.dtype),
        best=x_adv.clone(),
        best_gradient=slope.gradient.clone(),
        best_losses=losses.clone(),
        increases=nothing,
        best_at_check=losses.clone(),
        # No halving for want of progress at the first checkpoint of a step that is new (Condition 2 of the paper).
        halved_at_check=torch.ones_like(nothing, dtype=torch.bool),
    )
    return climb.keep(hunt.offer(rows, x_adv, slope.logits))


def _step(climb: _Climb, *, epsilon: float, momentum: float) -> None:
    """Move every image one step along the sign of its gradient, in place."""
    x, now = climb.x, climb.x_adv
    ahead = project(now + climb.step[:, None, None, None] * climb.gradient.sign(), x, epsilon=epsilon)
    moved = now + momentum * (ahead - now) + (1.0 - momentum) * (now - climb.previous)
    climb.previous, climb.x_adv = now, project(moved, x, epsilon=epsilon)


def _look(hunt: AttackState, objective: Objective, climb: _Climb, *, with_gradient: bool) -> _Climb:
    """Ask the model about the points reached, drop what broke, and remember the best points."""
    rows = climb.rows
    if with_gradient:
        slope = input_gradient(hunt.model_for(rows), climb.x_adv, lambda logits: objective(logits, rows))
        climb.gradient, losses, logits = slope.gradient, slope.losses, slope.logits
    else:
        logits = hunt.ask(rows, climb.x_adv)
        losses = objective(logits, rows)
    losses = _comparable(losses)
    climb.increases = climb.increases + (losses > climb.losses)
    climb.losses = losses
    climb = climb.keep(hunt.offer(rows, climb.x_adv, logits))
    better = climb.losses > climb.best_losses
    climb.best[better] = climb.x_adv[better]
    climb.best_gradient[better] = climb.gradient[better]
    climb.best_losses = torch.maximum(climb.best_losses, climb.losses)
    return climb


def _check_step_sizes(climb: _Climb, *, interval: int) -> None:
    """Conditions 1 and 2 of the paper, in place."""
    too_few = climb.increases < ENOUGH_INCREASES * interval
    no_progress = ~climb.halved_at_check & (climb.best_losses <= climb.best_at_check)
    halve = too_few | no_progress
    climb.step = torch.where(halve, climb.step / 2, climb.step)
    back = halve[:, None, None, None]
    climb.x_adv = torch.where(back, climb.best, climb.x_adv)
    climb.gradient = torch.where(back, climb.best_gradient, climb.gradient)
    climb.losses = torch.where(halve, climb.best_losses, climb.losses)
    climb.halved_at_check, climb.best_at_check = halve, climb.best_losses.clone()
    climb.increases = torch.zeros_like(climb.increases)


def _comparable(losses: Tensor) -> Tensor:
    """NaN counts as the lowest loss: it would compare as neither better nor worse, and stay the best for ever."""
    return losses.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _check(*, epsilon: float, steps: int, runs: int, what: str) -> None:
    step_length(None, epsilon=epsilon, steps=steps)
    if runs < 1:
        raise UsageError(f"{what} is {runs}; give at least 1")
