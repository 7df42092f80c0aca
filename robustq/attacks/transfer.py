"""Adversarial images found on other models (Papernot et al. 2016, arXiv:1605.07277)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustq.attacks.apgd import apgd
from robustq.attacks.base import AttackState, Criterion, Model, asked_about, step_length
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.losses import Loss, cross_entropy
from robustq.errors import UsageError


def transfer(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    surrogates: Sequence[Model],
    steps: int = 50,
    loss: Loss = cross_entropy,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Attack each surrogate with APGD and ask the model about the picture with the surrogate's highest margin.

    On the surrogate an image is attacked to the last step, whether the surrogate was right about it or not. The model
    is asked about the clean images and about one picture of each surrogate, and never for a gradient.

    Args:
        model: images -> logits.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        surrogates: at least one model, differentiable with respect to the images, with the same classes.
        steps: of APGD on each surrogate, at least 1.
        loss: as for `apgd`.
        stop_when_broken: leave images that broke out of the next surrogate's attack.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams, for the starts.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the model's highest margin.

    Raises:
        UsageError: epsilon outside [0, 1], steps below 1, no surrogate, a model with fewer than two classes, or a
            surrogate without a gradient with respect to the images.
    """
    step_length(None, epsilon=epsilon, steps=steps)
    if not surrogates:
        raise UsageError("transfer has no surrogates; give at least one model to find pictures on")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for number, surrogate in enumerate(surrogates):
        rows = hunt.standing
        if not len(rows):
            break
        found = apgd(
            asked_about(surrogate, rows),
            hunt.x[rows],
            y[rows],
            epsilon=epsilon,
            steps=steps,
            loss=loss,
            criterion=_nothing_counts,
            generator=streams.child("transfer", number)[rows],
        )
        hunt.offer(rows, found, hunt.ask(rows, found))
    return hunt.x_adv


def _nothing_counts(pictures: Tensor, rows: Tensor) -> Tensor:
    """No picture breaks the surrogate, so that each image gets all steps and the highest margin is returned."""
    return torch.zeros_like(rows, dtype=torch.bool)
