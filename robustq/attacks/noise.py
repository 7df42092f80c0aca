"""Noise that needs no gradient: Gaussian, uniform, and corners of the ball.

Attacks that ask the model nothing: Gaussian noise (GN in the paper's tables) and uniform noise.

They take a model and labels like every attack, and ignore both. A gradient attack that leaves no fewer images than
these do has not attacked.

Random corners of the ball: the cheapest search, which no masked gradient can mislead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon, project, uniform_start
from robustq.attacks.base import AttackState, Criterion, Model
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.errors import UsageError


def gaussian_noise(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    sigma: float | None = None,
    bounded: bool = True,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """Gaussian noise: x + sigma * N(0, 1) per pixel, projected into the epsilon-ball and [0, 1].

    Deviation from ODG-Q (arXiv:2210.08701): the paper gives no sigma, and GN is not a bounded attack. Here sigma is
    epsilon unless given, and the result is projected like every other attack's, so that the columns of a table share
    one threat model; at sigma = epsilon that clips the 32% of the pixels that pass one sigma. `bounded=False` is the
    plain noise, clamped to [0, 1] only: it may leave the ball.

    Args:
        model: ignored.
        x: (N, C, H, W) float32 in [0, 1].
        y: ignored.
        epsilon: radius of the ball, 0 to 1.
        sigma: standard deviation before projection, in the unit of the images.
        bounded: whether the result is projected into the ball.
        generator: a CPU generator, or streams.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon outside [0, 1], or a negative or NaN sigma.
    """
    check_epsilon(epsilon)
    sigma = epsilon if sigma is None else sigma
    if not 0.0 <= sigma <= 1.0:
        raise UsageError(f"sigma is {sigma}; give a number from 0 to 1, in the unit of the images (8/255, not 8)")
    if isinstance(generator, ImageGenerators):
        noise = image_generators(generator, x).normal(tuple(x.shape[1:])).to(x)
    else:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return project(x + sigma * noise, x, epsilon=epsilon if bounded else 1.0)


def uniform_noise(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float, generator: torch.Generator | ImageGenerators | None = None
) -> Tensor:
    """Uniform noise: x + U(-epsilon, epsilon) per pixel, clamped to [0, 1].

    Args:
        model: ignored.
        x: (N, C, H, W) float32 in [0, 1].
        y: ignored.
        epsilon: radius of the ball, 0 to 1.
        generator: a CPU generator, or streams.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon outside [0, 1].
    """
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
    """Ask the model about x +- epsilon with random signs per pixel, clamped to [0, 1]; needs no gradient.

    A linear model is worst at a corner, so that noise from the inside of the ball underrates even random search.

    Args:
        model: images -> logits.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        corners: how many, at least 1; each costs one forward pass of an image that stands, and the attack one more.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon outside [0, 1], corners below 1, or a model with fewer than two classes.
    """
    check_epsilon(epsilon)
    if corners < 1:
        raise UsageError(f"corners is {corners}; give at least 1")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    for corner in range(corners):
        rows = hunt.standing
        if not len(rows):
            break
        signs = streams.child("corner", corner)[rows].signs(tuple(x.shape[1:])).to(x)
        x_adv = project(hunt.x[rows] + epsilon * signs, hunt.x[rows], epsilon=epsilon)
        hunt.offer(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv
