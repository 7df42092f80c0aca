"""What an evaluation found: counts, intervals, what each attack did, flags, and the pictures that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.evaluator import AttackResult
from robustq.evaluation.flags import MASKED, NOT_FOUND, NOT_JUDGED, Check

ENOUGH_IMAGES = 200
"""Below it a difference of two points is within chance, so that most flags could not be raised."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over ``images`` images; every accuracy is a fraction.

    Args:
        images: how many were used.
        epsilon: radius of the ball.
        clean: (N,) bool, right without attack.
        robust: (N,) bool, right without attack and under every attack (the worst case per image).
        attacked: attack name -> (n,) bool, right under that attack, of the images it was run on.
        twin_agreement: share of clean images that source and judge put into the same class.
        seconds: wall time.
        trials: every attack that was run, in order.
        checks: every look for masking.
        left_out: what the suite has and this evaluation has not, in words; it cannot be judged then.
        notes: what else is worth knowing about how it was judged.
        x_adv: (N, C, H, W) uint8, the worst picture of each image.
        found_by: N names of the attacks that found them.
    """

    images: int
    epsilon: float
    clean: Tensor
    robust: Tensor
    attacked: dict[str, Tensor]
    twin_agreement: float
    seconds: float
    x_adv: Tensor
    found_by: tuple[str, ...]
    trials: Sequence[AttackResult] = ()
    checks: Sequence[Check] = field(default=())
    left_out: Sequence[str] = ("this suite does not hunt for gradient masking",)
    notes: Sequence[str] = ()

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are right without attack."""
        return int(self.clean.sum()) / self.images

    @property
    def robust_accuracy(self) -> float:
        """Share of images that no attack of the suite broke: an upper bound of the true robust accuracy."""
        return int(self.robust.sum()) / self.images

    @property
    def flags(self) -> list[Check]:
        """The checks that were raised."""
        return [check for check in self.checks if check.raised]

    @property
    def not_judged_for(self) -> list[str]:
        """Why no verdict is given, where none is."""
        few = f"{self.images} images are too few, {ENOUGH_IMAGES} would do"
        return [*self.left_out, *([few] if self.images < ENOUGH_IMAGES else [])]

    @property
    def verdict(self) -> str:
        """``upper bound: masking suspected`` with any flag; ``no masking found`` when all was looked for."""
        if self.flags:
            return MASKED
        return NOT_JUDGED if self.not_judged_for else NOT_FOUND

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``robustq attack --json``."""
        return {
            "images": self.images,
            "epsilon": self.epsilon,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(wilson_interval(int(self.clean.sum()), self.images)),
            "robust_accuracy": self.robust_accuracy,
            "interval": list(wilson_interval(int(self.robust.sum()), self.images)),
            "attacks": {name: int(kept.sum()) / len(kept) for name, kept in self.attacked.items() if len(kept)},
            "stages": [trial.to_dict(images=self.images) for trial in self.trials],
            "queries": sum(trial.queries for trial in self.trials),
            "gradient_steps": sum(trial.gradient_steps for trial in self.trials),
            "twin_agreement": self.twin_agreement,
            "flags": [check.to_dict() for check in self.flags],
            "checks": [check.to_dict() for check in self.checks],
            "verdict": self.verdict,
            "not_judged_for": self.not_judged_for if self.verdict == NOT_JUDGED else [],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
