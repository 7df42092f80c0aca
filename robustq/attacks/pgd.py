"""PGD (Madry et al. 2018, arXiv:1706.06083) and BIM (Kurakin et al. 2017, arXiv:1607.02533; Eq. 3 of the ODG-Q paper).

BIM is PGD without its random start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.ascent import Model, input_gradient, step_length
from robustq.attacks.ball import project, uniform_start
from robustq.attacks.hunt import Hunt
from robustq.attacks.losses import Loss, cross_entropy
from robustq.attacks.sign_ascent import sign_ascent
from robustq.attacks.streams import Streams, streams_for


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
    generator: torch.Generator | Streams | None = None,
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
            anyway, so that the cost falls as images fall; all points of the way count (`hunt.Hunt`), as with
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
        hunt, streams = Hunt(model, x, y), streams_for(generator, x)
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
