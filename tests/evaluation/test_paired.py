"""The paired interval, against the definition, and what counts as a difference."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, pvariance

import pytest
import torch

from robustq.errors import UsageError
from robustq.evaluation.accuracy import Comparison, compare_kept


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (4, 0), (0, 7), (30, 12), (100, 0), (50, 50)])
def test_interval_is_that_of_a_mean_of_differences(only_first: int, only_second: int) -> None:
    images = 100
    differences = [1.0] * only_first + [-1.0] * only_second + [0.0] * (images - only_first - only_second)
    comparison = Comparison(images, only_first, only_second)
    assert comparison.difference == pytest.approx(fmean(differences), abs=1e-15)
    z = NormalDist().inv_cdf(0.975)
    assert comparison.half_width == pytest.approx(z * math.sqrt(pvariance(differences) / images), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("comparison", "points", "expected"),
    [
        (Comparison(1000, 21, 0), 2.0, True),
        (Comparison(1000, 20, 0), 2.0, False),  # not more than the threshold
        (Comparison(1000, 60, 39), 2.0, True),
        (Comparison(1000, 130, 109), 2.0, False),  # over it, but within chance
        (Comparison(100, 3, 0), 2.0, False),  # three images against none are within chance
        (Comparison(100, 4, 0), 2.0, True),
        (Comparison(1000, 0, 50), 2.0, False),
    ],
)
def test_a_difference_counts_beyond_threshold_and_interval(
    comparison: Comparison, points: float, expected: bool
) -> None:
    assert comparison.exceeds(points) is expected


def test_pairs_are_counted() -> None:
    first = torch.tensor([True, True, False, False, True])
    second = torch.tensor([True, False, True, False, False])
    assert compare_kept(first, second, images=7) == Comparison(7, only_first=2, only_second=1)


@pytest.mark.parametrize(("first", "second", "images"), [(3, 4, 9), (3, 3, 2), (0, 0, 0)])
def test_what_is_no_pair_is_refused(first: int, second: int, images: int) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        compare_kept(torch.ones(first, dtype=torch.bool), torch.ones(second, dtype=torch.bool), images=images)
