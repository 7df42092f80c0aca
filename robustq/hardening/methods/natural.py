"""Natural training: cross-entropy on clean images, the baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass

from robustq.hardening.methods.method import BaseMethod, MethodEntry


@dataclass(frozen=True)
class NaturalSettings:
    """The ``[natural]`` table of a recipe: it has no keys."""


class Natural(BaseMethod[NaturalSettings]):
    """Minimises the mean cross-entropy of clean images. best.pt is chosen by clean accuracy."""


METHOD = MethodEntry("natural", NaturalSettings, Natural)
