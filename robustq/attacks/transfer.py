"""Adversarial images found on other models (Papernot et al. 2016, arXiv:1605.07277)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustq.attacks.apgd import apgd
from robustq.attacks.base import AttackState, Criterion, Model, check_settings, none_breaks
from robustq.attacks.counted import model_for
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
    """Attack each surrogate with APGD, and query the model with the image of the surrogate's highest margin.

    On a surrogate every image gets all steps, also one that the surrogate misclassifies. The model gets the clean
    images and one image per surrogate, and is never differentiated.

    Args (the others are those of all attacks, see `robustq.attacks`):
        surrogates: at least one differentiable model with the same classes.
        steps: of APGD on each surrogate.
        loss: as for `apgd`.
    """
    check_settings(epsilon=epsilon, steps=steps)
    if not surrogates:
        raise UsageError("transfer has no surrogates; give at least one model to find adversarial images on")
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for number, surrogate in enumerate(surrogates):
        rows = state.remaining
        if not len(rows):
            break
        x_adv = apgd(
            model_for(surrogate, rows),
            state.x[rows],
            y[rows],
            epsilon=epsilon,
            steps=steps,
            loss=loss,
            criterion=none_breaks,  # and the image of its highest margin is returned
            generator=generators.child("transfer", number)[rows],
        )
        state.record(rows, x_adv, state.query(rows, x_adv))
    return state.x_adv
