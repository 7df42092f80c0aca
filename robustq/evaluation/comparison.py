"""Counts against thresholds: paired comparisons of two attacks on the same images, shares, and their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

from torch import Tensor

from robustq.errors import UsageError

_TAIL = 0.025
_Z = NormalDist().inv_cdf(1.0 - _TAIL)


class Level(NamedTuple):
    """Whether a count exceeds its threshold with 95% confidence, and whether the images at hand exceed it.

    A difference of the images at hand counts only beyond chance, with an interval above 0.
    """

    confident: bool
    observed: bool

    @classmethod
    def of_share(cls, count: int, total: int, share: float) -> Level:
        """A proportion against a threshold, both fractions."""
        return cls(share_exceeds(count, total, share), count > share * total)

    @classmethod
    def highest(cls, levels: Iterable[Level]) -> Level:
        """The highest of several levels."""
        levels = list(levels)
        return cls(any(level.confident for level in levels), any(level.observed for level in levels))


def share_exceeds(count: int, total: int, share: float) -> bool:
    """Whether the 95% interval of the proportion count / total lies above ``share``, between 0 and 1.

    The exact interval of Clopper & Pearson (1934, Biometrika 26), also for counts of a few images: ``count`` or more
    successes of a binomial distribution with that share have a probability below 2.5%.
    """
    if count <= share * total:
        return False
    log_share, log_rest = math.log(share), math.log1p(-share)
    below = sum(math.exp(_log_choose(total, k) + k * log_share + (total - k) * log_rest) for k in range(count))
    return 1.0 - below < _TAIL


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@dataclass(frozen=True)
class Comparison:
    """Counts of images that are right under only one of two attacks, and of all ``images``, right or wrong."""

    images: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy under the first attack minus that under the second, a fraction."""
        return (self.only_first - self.only_second) / self.images

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval of the difference of two paired proportions.

        z sqrt(b + c - (b - c)^2 / n) / n with b = only_first and c = only_second (Wald's interval, as in Agresti 2002,
        Categorical Data Analysis, section 10.1.1). Four images against none differ by more, three do not.
        """
        apart = self.only_first - self.only_second
        return _Z * math.sqrt(self.only_first + self.only_second - apart * apart / self.images) / self.images

    def exceeds(self, points: float) -> bool:
        """Whether the whole 95% interval of the difference lies above ``points`` percentage points."""
        return self.difference - self.half_width > points / 100

    def level(self, points: float) -> Level:
        """The difference against a threshold of ``points`` percentage points."""
        return Level(self.exceeds(points), self.difference > points / 100 and self.exceeds(0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "difference": self.difference, "half_width": self.half_width}


def compare_kept(first: Tensor, second: Tensor, *, images: int) -> Comparison:
    """Compare two attacks on the same images: (n,) bool each, right under the attack.

    ``images`` is the number that accuracies are shares of: n, or more where some were wrong without attack. UsageError
    if the attacks were not run on the same number of images, or on more than ``images``.
    """
    if first.shape != second.shape or len(first) > images or images < 1:
        raise UsageError(
            f"{len(first)} and {len(second)} of {images} images cannot be compared in pairs; run both attacks on the "
            "same images"
        )
    return Comparison(images, int((first & ~second).sum()), int((~first & second).sum()))
