"""Results of an evaluation: counts, intervals, each attack's result, flags, and the adversarial images as proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.flags import MASKED, NOT_FOUND, NOT_JUDGED, Check

ENOUGH_IMAGES = 200
"""With fewer images a difference of two points is within chance, so that most flags could not be raised."""


@dataclass(frozen=True)
class AttackResult:
    """The result of one attack on some of the images.

    Args:
        name, stage: of the attack, with the backward rule or the surrogate where there are several, and of the suite.
        indices, kept: (n,) int64, the images that were attacked; (n,) bool, right under this attack.
        remaining: number of images of the whole evaluation that no attack has broken so far.
        queries, gradient_steps: forward passes without gradient, of the judge too, and with gradient, one per image.
    """

    name: str
    stage: str
    indices: Tensor
    kept: Tensor
    remaining: int
    queries: int
    gradient_steps: int
    seconds: float

    @property
    def kept_indices(self) -> Tensor:
        """(k,) int64: the images that are right under this attack."""
        return self.indices[self.kept]

    @property
    def broken_indices(self) -> Tensor:
        """(b,) int64: the images that it broke."""
        return self.indices[~self.kept]

    def to_dict(self, *, images: int) -> dict[str, Any]:
        """Plain values for JSON; ``accuracy`` is that after this attack, as a share of ``images``."""
        return {
            "stage": self.stage,
            "attack": self.name,
            "images": len(self.indices),
            "kept": int(self.kept.sum()),
            "accuracy": self.remaining / images,
            "queries": self.queries,
            "gradient_steps": self.gradient_steps,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class SingleAnswers:
    """A judge that answers at random, asked once for each image, as a device does.

    Args:
        clean, robust: (N,) float64, the share of answers that are right without attack, and under the worst attack.
        draws: number of answers whose mean was attacked and judged beside it.
    """

    clean: Tensor
    robust: Tensor
    draws: int

    @property
    def clean_accuracy(self) -> float:
        """Expected share of right answers without attack."""
        return float(self.clean.mean())

    @property
    def robust_accuracy(self) -> float:
        """Expected share of right answers under attack."""
        return float(self.robust.mean())


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; every accuracy is a fraction of ``images``.

    Args:
        images, epsilon: N, and the radius of the ball.
        clean: (N,) bool, right without attack; of a judge that answers at random, in the mean of its answers.
        robust: (N,) bool, right without attack and under every attack (the worst case per image).
        attacked: attack name -> (n,) bool, right under that attack, of the images it was run on.
        twin_agreement: share of clean images that gradient model and judge put into the same class; None without a
            gradient model.
        x_adv, found_by: (N, C, H, W) uint8, the worst adversarial image of each image, and the attacks that found them.
        results: of every attack, in order.
        checks, not_checked: for gradient masking, and reasons why no verdict can be given.
        notes: on how it was judged.
        single: single answers of a judge that answers at random, or None.
    """

    images: int
    epsilon: float
    clean: Tensor
    robust: Tensor
    attacked: dict[str, Tensor]
    twin_agreement: float | None
    seconds: float
    x_adv: Tensor
    found_by: tuple[str, ...]
    results: Sequence[AttackResult]
    checks: Sequence[Check]
    not_checked: Sequence[str]
    notes: Sequence[str]
    single: SingleAnswers | None = None

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are right without attack; of random answers the lower of single ones and their mean."""
        in_mean = int(self.clean.sum()) / self.images
        return in_mean if self.single is None else min(in_mean, self.single.clean_accuracy)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that no attack of the suite broke: an upper bound of the true robust accuracy.

        Of random answers the lower of single ones and their mean.
        """
        in_mean = int(self.robust.sum()) / self.images
        return in_mean if self.single is None else min(in_mean, self.single.robust_accuracy)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the robust accuracy."""
        return wilson_interval(self.robust_accuracy * self.images, self.images)

    def _answers(self) -> dict[str, Any] | None:
        if self.single is None:
            return None
        mean = {"clean_accuracy": int(self.clean.sum()) / self.images}
        mean["robust_accuracy"] = int(self.robust.sum()) / self.images
        single = {"clean_accuracy": self.single.clean_accuracy, "robust_accuracy": self.single.robust_accuracy}
        return {"single": single, "mean": mean, "draws": self.single.draws}

    @property
    def flags(self) -> list[Check]:
        """The checks that were raised."""
        return [check for check in self.checks if check.raised]

    @property
    def suspected(self) -> list[Check]:
        """The checks whose threshold is exceeded, but within chance."""
        return [check for check in self.checks if check.suspected]

    @property
    def not_judged_for(self) -> list[str]:
        """Reasons why no verdict is given; empty if one is."""
        reasons = list(self.not_checked)
        if self.images < ENOUGH_IMAGES:
            reasons.append(f"a verdict needs {ENOUGH_IMAGES} images or more, these are {self.images}")
        elif self.suspected:
            names = ", ".join(check.name for check in self.suspected)
            reasons.append(f"{self.images} images do not decide the flags {names}; attack more images")
        return reasons

    @property
    def verdict(self) -> str:
        """``upper bound: masking suspected`` with any flag, ``not judged``, or ``no masking found``."""
        if self.flags:
            return MASKED
        return NOT_JUDGED if self.not_judged_for else NOT_FOUND

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``robustq attack --json``."""
        return {
            "images": self.images,
            "epsilon": self.epsilon,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(wilson_interval(self.clean_accuracy * self.images, self.images)),
            "robust_accuracy": self.robust_accuracy,
            "interval": list(self.interval),
            "random_answers": self._answers(),
            "attacks": {name: int(kept.sum()) / len(kept) for name, kept in self.attacked.items() if len(kept)},
            "stages": [result.to_dict(images=self.images) for result in self.results],
            "queries": sum(result.queries for result in self.results),
            "gradient_steps": sum(result.gradient_steps for result in self.results),
            "twin_agreement": self.twin_agreement,
            "flags": [check.to_dict() for check in self.flags],
            "suspected": [check.name for check in self.suspected],
            "checks": [check.to_dict() for check in self.checks],
            "verdict": self.verdict,
            "not_judged_for": self.not_judged_for if self.verdict == NOT_JUDGED else [],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
