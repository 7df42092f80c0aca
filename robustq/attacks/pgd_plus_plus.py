"""PGD++: PGD on rescaled logits, for networks whose cross-entropy saturates (Gupta & Ajanthan 2022, arXiv:2003.13511).

A network that is very sure of its answers, as binarised ones are without meaning to be, has a cross-entropy whose
gradient is lost in rounding; a factor on the logits brings it back and changes no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks.ascent import Model, step_length
from robustq.attacks.ball import uniform_start
from robustq.attacks.hunt import Criterion, Hunt
from robustq.attacks.losses import Loss, rescaled_cross_entropy
from robustq.attacks.sign_ascent import sign_ascent
from robustq.attacks.streams import Streams, streams_for


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
    generator: torch.Generator | Streams | None = None,
) -> Tensor:
    """PGD from a uniform start of the ball, on `losses.rescaled_cross_entropy`; all points of the way count.

    The factor on the logits is that of the paper's Hessian norm scaling, anew at each step (see the loss for what
    differs from the paper). Images that the model misclassifies are returned as they are, the others are dropped as
    they break (`hunt.Hunt`).

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
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`hunt.Criterion`).
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, a model with fewer than two classes, or without
            a gradient with respect to the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    streams = streams_for(generator, x)
    hunt = Hunt(model, x, y, criterion=criterion, stop=stop_when_broken)
    start = uniform_start(hunt.x[hunt.standing], epsilon=epsilon, generator=streams.child("pgd++")[hunt.standing])
    return sign_ascent(hunt, start, lambda logits, rows: loss(logits, y[rows]), epsilon=epsilon, step=step, steps=steps)
