"""Attacks in the L-infinity ball, one file per family, on any callable images -> logits.

Every attack is a plain function `attack(model, x, y, *, epsilon, ...) -> x_adv`. It keeps these promises:

- x_adv has the shape, dtype and device of x, carries no gradient, and lies inside the ball and inside [0, 1];
- at epsilon 0 it is x, bit for bit;
- randomness comes from the CPU generator it is given (the global CPU generator without one), so that results do not
  depend on the device;
- the model is called as it stands: no mode, flag or parameter is changed and no `.grad` is left on it. A forward pass
  in train mode moves BatchNorm's running statistics all the same, so put the model into the mode you mean to attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from robustq.attacks.fgsm import fgsm
from robustq.attacks.noise import gaussian_noise, uniform_noise
from robustq.attacks.pgd import bim, pgd
from robustq.attacks.tpgd import tpgd

ATTACKS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "gaussian_noise": gaussian_noise,
        "uniform_noise": uniform_noise,
        "fgsm": fgsm,
        "bim": bim,
        "pgd": pgd,
        "tpgd": tpgd,
    }
)
"""Every attack by its name (read-only)."""

__all__ = ["ATTACKS", "bim", "fgsm", "gaussian_noise", "pgd", "tpgd", "uniform_noise"]
