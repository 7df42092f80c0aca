"""Attacks along the sign of the gradient: FGSM, BIM, PGD, PGD++ and TPGD.

The loop of PGD's family for a hunt: steps along the gradient's sign for the images that still stand.

FGSM: one step along the sign of the gradient (Goodfellow et al. 2015, arXiv:1412.6572; Eq. 2 of the ODG-Q paper).

PGD (Madry et al. 2018, arXiv:1706.06083) and BIM (Kurakin et al. 2017, arXiv:1607.02533; Eq. 3 of the ODG-Q paper).

BIM is PGD without its random start.

TPGD: PGD on the KL divergence from the clean answer; Eq. 4 of the ODG-Q paper.

It is the inner attack of TRADES (Zhang et al. 2019, arXiv:1901.08573).

PGD++: PGD on rescaled logits, for networks whose cross-entropy saturates (Gupta & Ajanthan 2022, arXiv:2003.13511).

A network that is very sure of its answers, as binarised ones are without meaning to be, has a cross-entropy whose
gradient is lost in rounding; a factor on the logits brings it back and changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustq.attacks.ball import LEVEL_TOLERANCE, check_epsilon, project, uniform_start
from robustq.attacks.base import AttackState, Criterion, Model, input_gradient, step_length
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import Loss, cross_entropy, kl, rescaled_cross_entropy
from robustq.errors import UsageError

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, K), their rows in the batch (n,) int64) -> losses (n,), one per image."""


def sign_ascent(
    hunt: AttackState, start: Tensor, objective: Objective, *, epsilon: float, step: float, steps: int
) -> Tensor:
    """x_{t+1} = project(x_t + step * sign(grad_x objective(h(x_t)))); every point of the way, the start and the end
    included, is offered to the hunt.

    Args:
        hunt: the batch under attack; images that leave it cost nothing more.
        start: (n, C, H, W), a point of the ball for each image of `hunt.standing`.
        objective: what is ascended.
        epsilon: radius of the ball, 0 to 1.
        step: in the unit of the images.
        steps: how many, at least 1.

    Returns:
        (N, C, H, W): per image of the whole batch what the hunt holds.

    Raises:
        UsageError: a model without a gradient with respect to the images.
    """
    rows, x_adv = hunt.standing, start
    for _ in range(steps):
        if not len(rows):
            return hunt.x_adv
        slope = input_gradient(hunt.model_for(rows), x_adv, partial(_of_rows, objective=objective, rows=rows))
        goes_on = hunt.offer(rows, x_adv, slope.logits)
        rows = rows[goes_on]
        x_adv = x_adv[goes_on] + step * slope.gradient[goes_on].sign()
        x_adv = project(x_adv, hunt.x[rows], epsilon=epsilon)
    if len(rows):
        hunt.offer(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv


def _of_rows(logits: Tensor, *, objective: Objective, rows: Tensor) -> Tensor:
    return objective(logits, rows)


def fgsm(model: Model, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """x_adv = clip(x + epsilon * sign(grad_x CE(h(x), y))), clipped to [0, 1].

    A pixel with a gradient of exactly zero stays where it is, since sign(0) = 0. No randomness.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon outside [0, 1], or a model without a gradient with respect to the images.
    """
    check_epsilon(epsilon)
    slope = input_gradient(model, x, lambda logits: cross_entropy(logits, y))
    return project(x + epsilon * slope.gradient.sign(), x, epsilon=epsilon)


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
    stop_when_broken: bool = False,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD: x_0 uniform in the ball; x_{t+1} = project(x_t + step_size * sign(grad_x loss(h(x_t), y))); returns x_steps.

    A step longer than the ball is legal and is projected as it stands (the paper's 4/255 on ImageNet at 1/255). A pixel
    with a gradient of exactly zero stays where it is, since sign(0) = 0. For several restarts call it several times
    with the same generator (or children of the same streams) and take the worst case per image.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        step_size: in the unit of the images; epsilon / 4 if not given (the paper: 4/255).
        steps: how many, at least 1 (the paper: 20).
        loss: `losses.cross_entropy` or `losses.margin`, or any function of that type.
        random_start: start from a uniform point of the ball instead of `x`.
        keep_best: return per image not the last iterate but a misclassified one if any was met (start and end
            included), of these or else of all the one with the highest loss. Costs one forward pass more.
        stop_when_broken: drop images from the batch when they break, and attack none that the model misclassifies
            anyway, so that the cost falls as images fall; all points of the way count (`AttackState`), as with
            `keep_best`, and the picture kept of an image that stands is the one with the highest margin. Costs two
            forward passes more. Not what the paper's tables count, which is the last iterate.
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, or a model without a gradient with respect to
            the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    if stop_when_broken:
        hunt, streams = AttackState(model, x, y), image_generators(generator, x)
        rows = hunt.standing
        start = uniform_start(hunt.x[rows], epsilon=epsilon, generator=streams[rows]) if random_start else hunt.x[rows]
        return sign_ascent(
            hunt, start, lambda logits, rows: loss(logits, y[rows]), epsilon=epsilon, step=step, steps=steps
        )
    x_adv = uniform_start(x, epsilon=epsilon, generator=generator) if random_start else x.detach()
    best: _Iterate | None = None
    for _ in range(steps):
        slope = input_gradient(model, x_adv, lambda logits: loss(logits, y))
        if keep_best:
            best = _worse_for_model(best, _Iterate.of(x_adv, slope.logits, slope.losses, y))
        x_adv = project(x_adv + step * slope.gradient.sign(), x, epsilon=epsilon)
    if keep_best:
        with torch.no_grad():
            logits = model(x_adv)
            best = _worse_for_model(best, _Iterate.of(x_adv, logits, loss(logits, y), y))
        return best.x_adv
    return x_adv


def bim(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    stop_when_broken: bool = False,
) -> Tensor:
    """BIM: x_0 = x; x_{t+1} = project(x_t + step_size * sign(grad_x CE(h(x_t), y))); returns x_steps. No randomness.

    Args, result and errors are those of `pgd`.
    """
    return pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        random_start=False,
        stop_when_broken=stop_when_broken,
    )


@dataclass(frozen=True)
class _Iterate:
    """One point of the way per image: x_adv (N, C, H, W), whether it is misclassified (N,), its loss (N,)."""

    x_adv: Tensor
    wrong: Tensor
    losses: Tensor

    @classmethod
    def of(cls, x_adv: Tensor, logits: Tensor, losses: Tensor, y: Tensor) -> _Iterate:
        # NaN logits count as wrong, as the judge counts them (evaluation.accuracy.predict).
        return cls(x_adv, (logits.argmax(dim=1) != y) | logits.isnan().any(dim=1), losses)


def _worse_for_model(old: _Iterate | None, new: _Iterate) -> _Iterate:
    """Per image the misclassified one of two iterates, or the one with the higher loss when both or neither are."""
    if old is None:
        return new
    take = (new.wrong & ~old.wrong) | ((new.wrong == old.wrong) & (new.losses > old.losses))
    return _Iterate(
        torch.where(take[:, None, None, None], new.x_adv, old.x_adv),
        torch.where(take, new.wrong, old.wrong),
        torch.where(take, new.losses, old.losses),
    )


def tpgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    steps: int = 20,
    start: float = 1 / 255,
    rho: float | None = None,
    stop_when_broken: bool = False,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """TPGD: x_{t+1} = project(x_t + step_size * sign(grad_x KL(softmax h(x) || softmax h(x_t)))); returns x_steps.

    h(x) is computed once and held constant; labels are not used. With `rho` the ascended loss is that of Eq. 4a as it
    is printed, CE(h(x_t), y) + KL / rho. (Eq. 4a's second term is the task loss against h(x); with h(x) constant its
    gradient is that of KL.)

    x_0 is uniform in +-start around x (and inside the ball). At x itself KL has its minimum and its gradient is zero,
    so that the first step would follow rounding noise or nothing. Deviation from TRADES: an 8-bit input quantizer
    rounds 95% of its start of 0.001 * N(0, 1) back to x, so the start is at least +-1/255 (half of the pixels then
    change). A pixel with a gradient of exactly zero stays where it is.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels; used with `rho` only.
        epsilon: radius of the ball, 0 to 1.
        step_size: in the unit of the images; epsilon / 4 if not given (the paper: 4/255).
        steps: how many, at least 1 (the paper: 20).
        start: half the width of the random start, 1/255 to 1.
        rho: trade-off of Eq. 4a, positive; None for KL only.
        stop_when_broken: as in `pgd`; which images break uses the labels.
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, start below 1/255 or above 1, rho not positive,
            or a model without a gradient with respect to the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    if not 1.0 - LEVEL_TOLERANCE <= 255.0 * start <= 255.0:
        raise UsageError(f"start is {start}; give 1/255 to 1: an 8-bit input quantizer rounds a smaller one away")
    if rho is not None and not rho > 0.0:
        raise UsageError(f"rho is {rho}; give a positive number, or None for KL alone")
    if stop_when_broken:
        hunt, streams = AttackState(model, x, y), image_generators(generator, x)
        rows = hunt.standing
        near = uniform_start(hunt.x[rows], epsilon=start, generator=streams[rows])
        return sign_ascent(
            hunt,
            project(near, hunt.x[rows], epsilon=epsilon),
            lambda logits, rows: _objective(logits, hunt.clean_logits[rows], y[rows], rho=rho),
            epsilon=epsilon,
            step=step,
            steps=steps,
        )
    with torch.no_grad():
        clean_logits = model(x)
    x_adv = project(uniform_start(x, epsilon=start, generator=generator), x, epsilon=epsilon)
    for _ in range(steps):
        slope = input_gradient(model, x_adv, lambda logits: _objective(logits, clean_logits, y, rho=rho))
        x_adv = project(x_adv + step * slope.gradient.sign(), x, epsilon=epsilon)
    return x_adv


def _objective(logits: Tensor, clean_logits: Tensor, y: Tensor, *, rho: float | None) -> Tensor:
    boundary = kl(logits, clean_logits)
    return boundary if rho is None else cross_entropy(logits, y) + boundary / rho


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
    """PGD from a uniform start of the ball, on `losses.rescaled_cross_entropy`; all points of the way count.

    The factor on the logits is that of the paper's Hessian norm scaling, anew at each step (see the loss for what
    differs from the paper). Images that the model misclassifies are returned as they are, the others are dropped as
    they break (`AttackState`).

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        step_size: in the unit of the images; epsilon / 4 if not given.
        steps: how many, at least 1; each costs a forward and a backward pass of an image that stands, and the attack
            two forward passes more.
        loss: another loss, such as `losses.cross_entropy`: the same attack without rescaling, to compare with.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, a model with fewer than two classes, or without
            a gradient with respect to the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    start = uniform_start(hunt.x[hunt.standing], epsilon=epsilon, generator=streams.child("pgd++")[hunt.standing])
    return sign_ascent(hunt, start, lambda logits, rows: loss(logits, y[rows]), epsilon=epsilon, step=step, steps=steps)
