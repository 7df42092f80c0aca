"""Attacks in the L-infinity ball, one file per family, on any callable images -> logits.

Every attack is a plain function `attack(model, x, y, *, epsilon, ...) -> x_adv`. It keeps these promises:

- x_adv has the shape, dtype and device of x, carries no gradient, and lies inside the ball and inside [0, 1];
- at epsilon 0 it is x, bit for bit;
- randomness comes from the CPU generator it is given (the global CPU generator without one), or from random streams
  that belong to the images (`generators.ImageGenerators`), so that results do not depend on the device;
- the model is called as it stands: no mode, flag or parameter is changed and no `.grad` is left on it. A forward pass
  in train mode moves BatchNorm's running statistics all the same, so put the model into the mode you mean to attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from robustq.attacks.apgd import apgd, apgd_targeted
from robustq.attacks.base import Counted
from robustq.attacks.fab import fab, fab_targeted
from robustq.attacks.feature_space import feature_space
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.noise import gaussian_noise, random_corners, uniform_noise
from robustq.attacks.pgd import bim, fgsm, pgd, pgd_plus_plus, tpgd
from robustq.attacks.rays import rays
from robustq.attacks.square import square
from robustq.attacks.transfer import transfer

ATTACKS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "gaussian_noise": gaussian_noise,
        "uniform_noise": uniform_noise,
        "fgsm": fgsm,
        "bim": bim,
        "pgd": pgd,
        "tpgd": tpgd,
        "pgd_plus_plus": pgd_plus_plus,
        "apgd": apgd,
        "apgd_targeted": apgd_targeted,
        "fab": fab,
        "fab_targeted": fab_targeted,
        "random_corners": random_corners,
        "square": square,
        "rays": rays,
        "feature_space": feature_space,
        "transfer": transfer,
    }
)
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
    "random_corners",
    "rays",
    "square",
    "tpgd",
    "transfer",
    "uniform_noise",
]
