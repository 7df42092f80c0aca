"""Two attacks on the same images: how much more one leaves than the other, and whether chance could have done it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

from robustq.errors import UsageError

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Comparison:
    """Images that only one of two attacks leaves right; the rest say nothing about the difference.

    Args:
        images: all that were used, right or wrong.
        only_first: right under the first attack, wrong under the second.
        only_second: the other way round.
    """

    images: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy under the first attack minus that under the second, a fraction."""
        return (self.only_first - self.only_second) / self.images

    @property
    def half_width(self) -> float:
        """Of the 95% interval of the difference of two paired proportions.

        z sqrt(b + c - (b - c)^2 / n) / n with b and c the images that only one of them leaves (Wald's interval, as in
        Agresti 2002, Categorical Data Analysis, section 10.1.1). Its lower end passes 0 from four images against none.
        """
        apart = self.only_first - self.only_second
        return _Z * math.sqrt(self.only_first + self.only_second - apart * apart / self.images) / self.images

    def exceeds(self, points: float) -> bool:
        """Whether the first leaves more than ``points`` percentage points more, and more than the interval is wide."""
        return self.difference > points / 100 and self.difference > self.half_width

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": self.images,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "difference": self.difference,
            "half_width": self.half_width,
        }


def compare_kept(first: Tensor, second: Tensor, *, images: int) -> Comparison:
    """Compare what two attacks left of the same images.

    Args:
        first, second: (n,) bool, right under each.
        images: the images that accuracies are shares of; n, or more where some were wrong without attack.

    Raises:
        UsageError: the attacks were not run on the same number of images, or on more than ``images``.
    """
    if first.shape != second.shape or len(first) > images or images < 1:
        raise UsageError(
            f"{len(first)} and {len(second)} of {images} images cannot be compared in pairs; run both attacks on the "
            "same images"
        )
    return Comparison(images, int((first & ~second).sum()), int((~first & second).sum()))
