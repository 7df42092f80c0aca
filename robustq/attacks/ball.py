"""The L-infinity ball around an image, in floats and in uint8 pixel levels.

Images are float tensors in [0, 1] (pixel / 255); epsilon is in the same unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.attacks.generators import ImageGenerators, draw_generator, image_generators
from robustq.errors import UsageError

LEVEL_TOLERANCE = 1e-4
"""Distance from an integer, in pixel levels, up to which a value still means that level.

float32 holds k/255 to within 5e-5 levels however it was computed (k / 255, or k * (1 / 255)), and 8/255 written with
six digits, 0.0313725, is 7.99999 levels. The tolerance enlarges the ball by at most 4e-7.
"""


@torch.no_grad()
def project(x_adv: Tensor, x: Tensor, *, epsilon: float) -> Tensor:
    """Move every pixel of `x_adv` (N, C, H, W) to the nearest value inside the epsilon-ball of `x` and inside [0, 1].

    A NaN pixel becomes the pixel of `x`: a NaN would break any model without being an attack. The result has the dtype
    of `x` and no gradient, and equals `x` for epsilon 0. UsageError for epsilon outside [0, 1] (usually 8 instead of
    8/255), or if the shapes differ.
    """
    _check(x_adv, x, epsilon=epsilon)
    x_adv = torch.where(x_adv.isnan(), x, x_adv)
    return torch.clamp(x_adv, min=x - epsilon, max=x + epsilon).clamp(0.0, 1.0)


@torch.no_grad()
def uniform_start(x: Tensor, *, epsilon: float, generator: torch.Generator | ImageGenerators | None = None) -> Tensor:
    """A point drawn uniformly from the epsilon-ball of each image, clamped to [0, 1]; drawn on its device.

    Returns (N, C, H, W), dtype and device of `x`, without gradient. UsageError as of `project` and `image_generators`.
    """
    check_epsilon(epsilon)
    if isinstance(generator, ImageGenerators):
        noise = image_generators(generator, x).uniform(tuple(x.shape[1:])).to(x)
    else:
        own = draw_generator(generator, x.device)
        noise = torch.rand(x.shape, generator=own, dtype=torch.float32, device=x.device).to(x)
    return project(x + epsilon * (2.0 * noise - 1.0), x, epsilon=epsilon)


def uniform_noise_and_peak(x: Tensor, generators: ImageGenerators) -> tuple[Tensor, Tensor]:
    """Uniform noise in [-1, 1), (N, C, H, W), and each image's largest absolute value of it, (N, 1, 1, 1).

    The noise divided by its peak touches the edge of the unit ball.
    """
    noise = (2.0 * generators.uniform(tuple(x.shape[1:])) - 1.0).to(x)
    return noise, noise.flatten(1).abs().amax(dim=1).clamp(min=1e-12)[:, None, None, None]


@torch.no_grad()
def round_to_uint8(x_adv: Tensor, x: Tensor, *, epsilon: float) -> Tensor:
    """The uint8 image nearest to `x_adv` inside the epsilon-ball of the uint8 image `x`, as floats k/255.

    All arithmetic is on integer pixel levels, exact in float32. With r = floor(255 epsilon), a level k of `x` may
    become any of max(k - r, 0) .. min(k + r, 255): 8/255 and 8.9/255 allow 8 levels, an epsilon below 1/255 none.
    Values within `LEVEL_TOLERANCE` of an integer level count as that level. Half-way values go to the even level. A NaN
    pixel becomes the pixel of `x`. Both are (N, C, H, W), `x` float k/255 with k = 0 .. 255. The result has the dtype
    of `x` and no gradient; each value is the float nearest to k/255, on every device. UsageError as of `project`, or if
    `x` does not hold uint8 pixels (usually because it was normalised, resized or augmented in float).
    """
    _check(x_adv, x, epsilon=epsilon)
    levels = (x * 255.0).round()
    off = (x * 255.0 - levels).abs()
    # Written so that NaN fails as well.
    if not bool(((off <= LEVEL_TOLERANCE) & (levels >= 0) & (levels <= 255)).all()):
        raise UsageError(
            f"the clean images are not uint8 pixels: values from {float(x.min()):.6g} to {float(x.max()):.6g}, up to "
            f"{float(off.max()):.3g} levels away from k/255; give images that are uint8 pixels divided by 255"
        )
    radius = math.floor(255.0 * epsilon + LEVEL_TOLERANCE)
    wanted = torch.where(x_adv.isnan(), levels, (x_adv * 255.0).round())
    wanted = torch.clamp(wanted, min=levels - radius, max=levels + radius).clamp(0.0, 255.0)
    # A tensor as divisor: CUDA multiplies by the rounded reciprocal of a Python number, which misses the nearest float
    # for some levels.
    return wanted / torch.full_like(wanted, 255.0)


def check_epsilon(epsilon: float) -> None:
    """Raise UsageError unless epsilon is a number in [0, 1]."""
    if not 0.0 <= epsilon <= 1.0:  # NaN fails as well
        raise UsageError(f"epsilon is {epsilon}; give a number from 0 to 1, in the unit of the images (8/255, not 8)")


def _check(x_adv: Tensor, x: Tensor, *, epsilon: float) -> None:
    check_epsilon(epsilon)
    if x_adv.shape != x.shape:
        raise UsageError(
            f"adversarial images have shape {tuple(x_adv.shape)} and clean ones {tuple(x.shape)}; give one for each"
        )
