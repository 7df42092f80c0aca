"""Attacks in the L-infinity ball, one file per family, on any callable images -> logits.

Every attack is a function `attack(model, x, y, *, epsilon, ...) -> x_adv`.

Args that attacks share:
    model: images (N, C, H, W) -> logits (N, K); for gradient attacks differentiable with respect to the images. No
        mode, flag or parameter of it is changed, and no `.grad` is left on it. Put it into eval mode first: a forward
        pass in train mode moves BatchNorm's running statistics.
    x: (N, C, H, W) float32 in [0, 1].
    y: (N,) int64 labels.
    epsilon: radius of the ball, 0 to 1.
    step_size: in the unit of the images; default epsilon / 4.
    steps, restarts, queries, ...: budget per image, at least 1.
    stop_when_broken: drop images from the batch when they break. It changes the cost, not which images break.
    criterion: decides which misclassified images count as broken (`base.Criterion`); default: all of them.
    generator: a CPU generator (default: torch's global one), or `ImageGenerators`, one per image, whose numbers do not
        depend on the device; draws of a CPU generator itself are a device's own.

Returns:
    (N, C, H, W), dtype and device of `x`, without gradient, inside the ball and [0, 1]; at epsilon 0 bitwise `x`.
    Attacks with `criterion` return misclassified images as they are. Of the others they return an adversarial image
    that broke, if one was met; of these, or else of all, the one with the highest margin.

Raises:
    UsageError: a setting out of its range, a model without gradient where one is needed, or, in attacks with
        `criterion`, a model with fewer than two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from robustq.attacks.apgd import apgd, apgd_targeted
from robustq.attacks.counted import Counted
from robustq.attacks.fab import fab, fab_targeted
from robustq.attacks.feature_space import feature_space
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.noise import gaussian_noise, random_corners, uniform_noise
from robustq.attacks.pgd import bim, fgsm, pgd, pgd_plus_plus, pgd_targeted, tpgd
from robustq.attacks.rays import rays
from robustq.attacks.square import square
from robustq.attacks.transfer import transfer

_ATTACKS = (
    *(gaussian_noise, uniform_noise, random_corners, fgsm, bim, pgd, tpgd, pgd_plus_plus, pgd_targeted),
    *(apgd, apgd_targeted, fab, fab_targeted, square, rays, feature_space, transfer),
)

ATTACKS: Mapping[str, Callable[..., Tensor]] = MappingProxyType({attack.__name__: attack for attack in _ATTACKS})
"""Every attack by its name (read-only). `feature_space` and `transfer` need more than a model and a radius."""

__all__ = [
    "ATTACKS",
    "Counted",
    "ImageGenerators",
    "apgd",
    "apgd_targeted",
    "bim",
    "fab",
    "fab_targeted",
    "feature_space",
    "fgsm",
    "gaussian_noise",
    "pgd",
    "pgd_plus_plus",
    "pgd_targeted",
    "random_corners",
    "rays",
    "square",
    "tpgd",
    "transfer",
    "uniform_noise",
]
