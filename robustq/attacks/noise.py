"""Attacks without gradient or search: Gaussian noise (GN in the paper's tables), uniform noise, and random corners."""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon, project, uniform_start
from robustq.attacks.base import AttackState, Criterion, Model, check_settings
from robustq.attacks.generators import ImageGenerators, draw_generator, image_generators
from robustq.errors import UsageError


def gaussian_noise(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    sigma: float | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Gaussian noise: x + sigma * N(0, 1) per pixel, projected into the ball; model and labels are not used.

    Deviation from ODG-Q (arXiv:2210.08701): the paper gives no sigma, and does not bound GN. The projection gives all
    columns of a table one threat model; at sigma = epsilon it clips the 32% of the pixels that pass one sigma.

    Args (the others are those of all attacks, see `robustq.attacks`):
        sigma: standard deviation before projection, 0 to 1; default epsilon.
    """
    check_epsilon(epsilon)
    sigma = epsilon if sigma is None else sigma
    if not 0.0 <= sigma <= 1.0:
        raise UsageError(f"sigma is {sigma}; give a number from 0 to 1, in the unit of the images (8/255, not 8)")
    if isinstance(generator, ImageGenerators):
        noise = image_generators(generator, x).normal(tuple(x.shape[1:])).to(x)
    else:
        own = draw_generator(generator, x.device)
        noise = torch.randn(x.shape, generator=own, dtype=torch.float32, device=x.device).to(x)
    return project(x + sigma * noise, x, epsilon=epsilon)


def uniform_noise(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float, generator: torch.Generator | ImageGenerators | None = None
) -> Tensor:
    """Uniform noise: x + U(-epsilon, epsilon) per pixel, clamped to [0, 1]; model and labels are not used."""
    return uniform_start(x, epsilon=epsilon, generator=generator)


@torch.no_grad()
def random_corners(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    corners: int = 20,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Query the model with x +- epsilon, random signs per pixel, clamped to [0, 1].

    A linear model is worst at a corner, so that noise from the inside of the ball underrates even random search.

    Args (the others are those of all attacks, see `robustq.attacks`):
        corners: each costs one query; the attack costs one more.
    """
    check_settings(epsilon=epsilon, corners=corners)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = state.remaining
    for corner in range(corners):
        if not len(rows):
            break
        signs = generators.child("corner", corner)[rows].signs(tuple(x.shape[1:])).to(x)
        x_adv = project(state.x[rows] + epsilon * signs, state.x[rows], epsilon=epsilon)
        rows = state.drop(state.record(rows, x_adv, state.query(rows, x_adv)), corner, rows)
    return state.x_adv
