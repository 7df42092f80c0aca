"""Auto-PGD: PGD that chooses its step sizes itself (Croce & Hein 2020, arXiv:2003.01690, section 3 and Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.ball import project, uniform_noise_and_peak
from robustq.attacks.base import (
    AttackState,
    Criterion,
    Model,
    Objective,
    check_settings,
    gradient_of_rows,
    left,
    likely_targets,
    select,
)
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import Loss, TargetedLoss, cross_entropy, nan_to_lowest, targeted_dlr

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

    z = project(x_t + step * sign(grad)); x_{t+1} = project(x_t + 0.75 (z - x_t) + 0.25 (x_t - x_{t-1})). The first
    checkpoint comes after 22% of the steps, the others at distances that shrink by 3% down to 6%. There an image's step
    is halved and it goes back to its best point, if fewer than 75% of the steps since the last checkpoint raised the
    loss, or if neither the step nor the highest loss changed since. A run starts at noise that is uniform in the ball
    and scaled to touch its edge.

    Args (the others are those of all attacks, see `robustq.attacks`):
        steps: per run; each costs a forward and a backward pass, and the run one forward pass more.
        loss: `losses.cross_entropy`, `margin` or `dlr`, or any function of that type.
        restarts: number of runs; each attacks the images that the earlier ones left.
    """
    check_settings(epsilon=epsilon, steps=steps, restarts=restarts)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for restart in range(restarts):
        child = generators.child("apgd", restart)
        _run(state, lambda logits, rows: loss(logits, y[rows]), child, epsilon=epsilon, steps=steps)
    return state.x_adv


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

    An image breaks when any class beats its label, the targeted one or not.

    Args (the others as for `apgd`):
        loss: `losses.targeted_dlr` or `targeted_margin`, or any function of that type.
        target_classes: number of runs, each towards another class; at most the number of other classes.
    """
    check_settings(epsilon=epsilon, steps=steps, target_classes=target_classes)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for rank, target in enumerate(likely_targets(state.clean_logits, y, count=target_classes, generators=generators)):

        def objective(logits: Tensor, rows: Tensor, target: Tensor = target) -> Tensor:
            return loss(logits, y[rows], target[rows])

        _run(state, objective, generators.child("apgd", rank), epsilon=epsilon, steps=steps)
    return state.x_adv


def checkpoints(steps: int) -> frozenset[int]:
    """The steps after which step sizes are reviewed: w_j = ceil(p_j * steps).

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    found, percent, distance = set(), 22, 22  # in hundredths, so that no rounding moves a ceil
    while percent < 100:
        found.add(-(-percent * steps // 100))
        distance = max(distance - 3, 6)
        percent += distance
    return frozenset(found)


@dataclass
class _Run:
    """The images of a run that are still attacked; every field has one entry per image."""

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


def _run(state: AttackState, objective: Objective, generators: ImageGenerators, *, epsilon: float, steps: int) -> None:
    rows = state.remaining
    if not len(rows):
        return
    x = state.x[rows]
    noise, peak = uniform_noise_and_peak(x, generators[rows])
    x_adv = project(x + epsilon * noise / peak, x, epsilon=epsilon)
    gradient, losses, logits = gradient_of_rows(state.model, rows, x_adv, objective)
    losses = nan_to_lowest(losses)
    run = _Run(
        rows=rows,
        x=x,
        x_adv=x_adv,
        previous=x_adv,
        gradient=gradient,
        losses=losses,
        step=torch.full_like(losses, 2.0 * epsilon, dtype=x.dtype),
        best=x_adv.clone(),
        best_gradient=gradient.clone(),
        best_losses=losses.clone(),
        increases=torch.zeros_like(losses),
        best_at_check=losses.clone(),
        # At the first checkpoint the step is new, so that Condition 2 of the paper does not apply.
        halved_at_check=torch.ones_like(losses, dtype=torch.bool),
    )
    run = select(run, left(state.record(rows, x_adv, logits), 0))
    checks, last_check = checkpoints(steps), 0
    for number in range(1, steps + 1):
        if not len(run.rows):
            return
        momentum = MOMENTUM if number > 1 else 1.0
        ahead = project(run.x_adv + run.step[:, None, None, None] * run.gradient.sign(), run.x, epsilon=epsilon)
        moved = run.x_adv + momentum * (ahead - run.x_adv) + (1.0 - momentum) * (run.x_adv - run.previous)
        run.previous, run.x_adv = run.x_adv, project(moved, run.x, epsilon=epsilon)
        run = _evaluate(state, objective, run, number=number, with_gradient=number < steps)
        if number in checks:
            _review_step_sizes(run, interval=number - last_check)
            last_check = number


def _evaluate(state: AttackState, objective: Objective, run: _Run, *, number: int, with_gradient: bool) -> _Run:
    """Evaluate the current points, drop the images that broke, and keep the best points."""
    if with_gradient:
        run.gradient, losses, logits = gradient_of_rows(state.model, run.rows, run.x_adv, objective)
    else:
        logits = state.query(run.rows, run.x_adv)
        losses = objective(logits, run.rows)
    losses = nan_to_lowest(losses)
    run.increases = run.increases + (losses > run.losses)
    run.losses = losses
    run = select(run, left(state.record(run.rows, run.x_adv, logits), number))
    better = run.losses > run.best_losses
    run.best = torch.where(better[:, None, None, None], run.x_adv, run.best)
    run.best_gradient = torch.where(better[:, None, None, None], run.gradient, run.best_gradient)
    run.best_losses = torch.maximum(run.best_losses, run.losses)
    return run


def _review_step_sizes(run: _Run, *, interval: int) -> None:
    """Halve step sizes by conditions 1 and 2 of the paper, in place."""
    too_few = run.increases < ENOUGH_INCREASES * interval
    no_progress = ~run.halved_at_check & (run.best_losses <= run.best_at_check)
    halve = too_few | no_progress
    run.step = torch.where(halve, run.step / 2, run.step)
    back = halve[:, None, None, None]
    run.x_adv = torch.where(back, run.best, run.x_adv)
    run.gradient = torch.where(back, run.best_gradient, run.gradient)
    run.losses = torch.where(halve, run.best_losses, run.losses)
    run.halved_at_check, run.best_at_check = halve, run.best_losses.clone()
    run.increases = torch.zeros_like(run.increases)
