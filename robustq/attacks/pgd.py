"""Attacks along the sign of the gradient: FGSM, BIM, PGD, TPGD, PGD++, targeted PGD; one loop, `sign_ascent`.

- FGSM: one step (Goodfellow et al. 2015, arXiv:1412.6572; Eq. 2 of ODG-Q).
- BIM: several steps from the image (Kurakin et al. 2017, arXiv:1607.02533; Eq. 3 of ODG-Q).
- PGD: BIM from a random start (Madry et al. 2018, arXiv:1706.06083).
- TPGD: PGD on the KL divergence from the clean answer (Zhang et al. 2019, arXiv:1901.08573; Eq. 4 of ODG-Q).
- Targeted PGD: PGD towards one class after the other.
- PGD++: PGD on rescaled logits, for networks whose cross-entropy saturates (Gupta & Ajanthan 2022, arXiv:2003.13511).

A pixel with a gradient of exactly zero stays where it is, since sign(0) = 0. A step longer than the ball is allowed and
is projected (the paper's 4/255 on ImageNet at 1/255).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustq.attacks.ball import LEVEL_TOLERANCE, project, uniform_start
from robustq.attacks.base import (
    AttackState,
    Criterion,
    Model,
    Objective,
    check_settings,
    gradient_of_rows,
    left,
    likely_targets,
    misclassified,
)
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import Loss, TargetedLoss, cross_entropy, kl, rescaled_cross_entropy, targeted_margin
from robustq.errors import UsageError

Record = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(rows (n,), x_adv (n, C, H, W), logits (n, K)) -> (n,) bool, the rows to continue with; None: all."""


def default_step(step_size: float | None, *, epsilon: float, steps: int) -> float:
    """The step size of an attack, `epsilon / 4` if none is given; UsageError for a setting out of its range."""
    check_settings(epsilon=epsilon, steps=steps)
    if step_size is None:
        return epsilon / 4
    if not 0.0 <= step_size <= 1.0:
        raise UsageError(f"step_size is {step_size}; give a number from 0 to 1, in the unit of the images, like 2/255")
    return step_size


def sign_ascent(
    model: Model,
    x: Tensor,
    start: Tensor,
    objective: Objective,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    rows: Tensor | None = None,
    record: Record | None = None,
) -> tuple[Tensor, Tensor]:
    """x_{t+1} = project(x_t + step_size * sign(grad_x objective(h(x_t)))), from x_0 = `start`.

    Args:
        model, x: h, and (N, C, H, W), the clean images of the whole batch.
        start: (n, C, H, W), for each of the rows.
        rows: (n,) int64, the images to attack; default: all.
        record: gets every iterate but the last, and may drop images.

    Returns the rows that were not dropped, and their last iterates.
    """
    x_adv = start
    clean = x if rows is None else x[rows]
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    for number in range(steps):
        if not len(rows):
            break
        gradient, _, logits = gradient_of_rows(model, rows, x_adv, objective)
        kept = None if record is None else left(record(rows, x_adv, logits), number)
        if kept is not None:
            rows, x_adv, gradient, clean = rows[kept], x_adv[kept], gradient[kept], clean[kept]
        x_adv = project(x_adv + step_size * gradient.sign(), clean, epsilon=epsilon)
    return rows, x_adv


def fgsm(model: Model, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """x_adv = clip(x + epsilon * sign(grad_x CE(h(x), y))), clipped to [0, 1]; no randomness."""
    return bim(model, x, y, epsilon=epsilon, step_size=epsilon, steps=1)


def bim(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float, step_size: float | None = None, steps: int = 20
) -> Tensor:
    """PGD on cross-entropy from x_0 = x; no randomness."""
    return pgd(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps, random_start=False)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    loss: Loss = cross_entropy,
    random_start: bool = True,
    keep_best: bool = False,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD: x_0 uniform in the ball; x_{t+1} = project(x_t + step_size * sign(grad_x loss(h(x_t), y))); returns x_steps.

    The paper's tables use 20 steps of 4/255. For several restarts call it with the same torch generator, or with
    children of the same image generators, and take the worst case per image.

    Args (the others are those of all attacks, see `robustq.attacks`):
        loss: `losses.cross_entropy` or `losses.margin`, or any function of that type.
        random_start: start from a uniform point of the ball instead of `x`.
        keep_best: return per image not the last iterate but a misclassified one if any was met (first and last
            included); of these, or else of all, the one with the highest loss. Costs one forward pass more.
    """
    step_size = default_step(step_size, epsilon=epsilon, steps=steps)
    start = uniform_start(x, epsilon=epsilon, generator=generator) if random_start else x.detach()
    best = _BestIterate(y, loss) if keep_best else None
    rows, x_adv = sign_ascent(
        model,
        x,
        start,
        lambda logits, rows: loss(logits, y),
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        record=best,
    )
    if best is None:
        return x_adv
    with torch.no_grad():
        best(rows, x_adv, model(x_adv))
    return best.x_adv


class _BestIterate:
    """Keeps per image a misclassified iterate before others, and of equals the first with the highest loss."""

    x_adv: Tensor

    def __init__(self, y: Tensor, loss: Loss) -> None:
        self.y, self.loss = y, loss
        self.wrong: Tensor | None = None

    @torch.no_grad()
    def __call__(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        wrong, losses = misclassified(logits, self.y), self.loss(logits, self.y)
        if self.wrong is None:
            self.x_adv, self.wrong, self.losses = x_adv, wrong, losses
        else:
            take = (wrong & ~self.wrong) | ((wrong == self.wrong) & (losses > self.losses))
            self.x_adv = torch.where(take[:, None, None, None], x_adv, self.x_adv)
            self.wrong = torch.where(take, wrong, self.wrong)
            self.losses = torch.where(take, losses, self.losses)


def tpgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    start: float = 1 / 255,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """TPGD: x_{t+1} = project(x_t + step_size * sign(grad_x KL(softmax h(x) || softmax h(x_t)))); returns x_steps.

    h(x) is computed once and held constant; labels are not used. x_0 is uniform in +-start around x (and inside the
    ball): at x itself KL has its minimum, and its gradient is zero or rounding noise. Deviation from TRADES: an 8-bit
    input quantizer rounds 95% of its start of 0.001 * N(0, 1) back to x, so the start is at least +-1/255, which
    changes half of the pixels.

    Args (the others are those of all attacks, see `robustq.attacks`):
        start: half the width of the random start, 1/255 to 1.
    """
    step_size = default_step(step_size, epsilon=epsilon, steps=steps)
    if not 1.0 - LEVEL_TOLERANCE <= 255.0 * start <= 255.0:
        raise UsageError(f"start is {start}; give 1/255 to 1: an 8-bit input quantizer rounds a smaller one away")
    with torch.no_grad():
        clean_logits = model(x)
    _, x_adv = sign_ascent(
        model,
        x,
        project(uniform_start(x, epsilon=start, generator=generator), x, epsilon=epsilon),
        lambda logits, rows: kl(logits, clean_logits),
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
    )
    return x_adv


def pgd_plus_plus(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    loss: Loss = rescaled_cross_entropy,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD from a uniform start on `losses.rescaled_cross_entropy`; every iterate counts.

    A network that is very sure of its answers, as binarised ones are, has a cross-entropy whose gradient is lost in
    rounding. A factor on the logits restores it and changes no answer (for the deviation from the paper see the loss).
    Costs one forward and backward pass per step, and two forward passes.

    Args (the others are those of all attacks, see `robustq.attacks`):
        loss: another loss; with `losses.cross_entropy` it is PGD that stops at success.
    """
    step_size = default_step(step_size, epsilon=epsilon, steps=steps)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = state.remaining
    start = uniform_start(state.x[rows], epsilon=epsilon, generator=generators.child("pgd++")[rows])
    rows, x_adv = sign_ascent(
        model,
        state.x,
        start,
        lambda logits, rows: loss(logits, y[rows]),
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        rows=rows,
        record=state.record,
    )
    if len(rows):
        state.record(rows, x_adv, state.query(rows, x_adv))
    return state.x_adv


def pgd_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    loss: TargetedLoss = targeted_margin,
    target_classes: int = 9,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD towards one class after the other, the highest of the clean logits first; every iterate counts.

    Each run starts at a uniform point of the ball. No step depends on the value of the loss: on a loss that is flat
    between decisions APGD halves its steps and returns to its best point, this attack goes on.

    Args (the others are those of all attacks, see `robustq.attacks`):
        steps: per target class; each costs a forward and a backward pass, and a run one forward pass more.
        loss: `losses.targeted_margin` or `targeted_dlr`, or any function of that type.
        target_classes: number of runs, each towards another class; at most the number of other classes.
    """
    check_settings(epsilon=epsilon, steps=steps, target_classes=target_classes)
    step_size = default_step(step_size, epsilon=epsilon, steps=steps)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for rank, target in enumerate(likely_targets(state.clean_logits, y, count=target_classes, generators=generators)):
        rows = state.remaining
        if not len(rows):
            break

        def objective(logits: Tensor, rows: Tensor, target: Tensor = target) -> Tensor:
            return loss(logits, y[rows], target[rows])

        start = uniform_start(state.x[rows], epsilon=epsilon, generator=generators.child("pgd-t", rank)[rows])
        rows, x_adv = sign_ascent(
            model,
            state.x,
            start,
            objective,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            rows=rows,
            record=state.record,
        )
        if len(rows):
            state.record(rows, x_adv, state.query(rows, x_adv))
    return state.x_adv
