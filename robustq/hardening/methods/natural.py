"""Natural training: cross-entropy on clean images, the baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass

from robustq.hardening.methods.method import Method
from robustq.hardening.methods.settings import MethodSettings


@dataclass(frozen=True, kw_only=True)
class NaturalSettings(MethodSettings):
    """The ``[natural]`` table of a recipe: it has no keys."""

    method = "natural"
    defends = False


class Natural(Method):
    """Minimises the mean cross-entropy of clean images. best.pt is chosen by clean accuracy."""

    settings: NaturalSettings
