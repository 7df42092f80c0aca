"""Right answers, the interval around their count, and the paired comparison."""

from __future__ import annotations

import importlib
import math
from statistics import NormalDist, fmean, pvariance

import pytest
import torch
from torch import Tensor

from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct, predict, wilson_interval
from robustq.evaluation.comparison import Comparison, compare_kept, share_exceeds

# Not a plain import: scipy (here through scikit-learn) has no type stubs.
binomtest = importlib.import_module("scipy.stats").binomtest


@pytest.mark.parametrize("total", [1, 2, 10, 360, 10_000])
def test_wilson_interval_equals_scipy(total: int) -> None:
    for successes in sorted({0, 1, total // 3, total // 2, total - 1, total}):
        expected = binomtest(successes, total).proportion_ci(confidence_level=0.95, method="wilson")
        # The same float64 formula; the normal quantiles come from two libraries and agree to some 1e-15.
        assert wilson_interval(successes, total) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)


def test_wilson_interval_ends_are_exact_and_impossible_counts_are_refused() -> None:
    # For 9, 13 and 15 images, among others, the formula's float64 rounding misses 1; for others it misses 0.
    for total in range(1, 100):
        assert wilson_interval(0, total)[0] == 0.0
        assert wilson_interval(total, total)[1] == 1.0
    for successes, total, named in ((0, 0, "0 images"), (-1, 10, "-1 correct"), (11, 10, "11 correct")):
        with pytest.raises(UsageError, match=named):
            wilson_interval(successes, total)


def as_logits(x: Tensor) -> Tensor:
    """Images (N, 1, 1, K) that are their own logits."""
    return x.flatten(1)


LOGITS = torch.tensor(
    [
        [0.1, 0.7, 0.2],
        [0.9, 0.0, 0.9],  # equal: the lowest class
        [0.0, math.nan, 1.0],  # NaN beside the highest
        [0.0, 0.0, math.inf],
        [-math.inf, -math.inf, -3.0],
        [math.nan, math.nan, math.nan],
    ]
)
IMAGES = LOGITS.view(6, 1, 1, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_predict_and_correct(batch_size: int) -> None:
    predictions = predict(as_logits, IMAGES, batch_size=batch_size)
    assert predictions.dtype == torch.int64
    assert predictions.tolist() == [1, 0, -1, 2, 2, -1]
    right = correct(as_logits, IMAGES, torch.tensor([1, 2, 2, 2, 0, -1]), batch_size=batch_size)
    assert right.tolist() == [True, False, False, True, False, False]  # NaN is wrong whatever the label
    assert predict(as_logits, IMAGES[:0], batch_size=batch_size).shape == (0,)


def test_bad_input_is_refused() -> None:
    for shape in ((6,), (1, 6), (6, 3, 1)):
        with pytest.raises(UsageError, match="logits must be"):
            predict(lambda x, shape=shape: torch.zeros(shape), IMAGES, batch_size=6)  # type: ignore[misc]
    with pytest.raises(UsageError, match="batch_size"):
        predict(as_logits, IMAGES, batch_size=0)
    with pytest.raises(UsageError, match="6 images and 1 labels"):
        correct(as_logits, IMAGES, torch.tensor([1]), batch_size=3)
    for first, second, images in ((3, 4, 9), (3, 3, 2), (0, 0, 0)):
        with pytest.raises(UsageError, match="cannot be compared"):
            compare_kept(torch.ones(first) > 0, torch.ones(second) > 0, images=images)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (4, 0), (30, 12), (50, 50)])
def test_paired_interval_is_that_of_a_mean_of_differences(only_first: int, only_second: int) -> None:
    differences = [1.0] * only_first + [-1.0] * only_second + [0.0] * (100 - only_first - only_second)
    comparison = Comparison(100, only_first, only_second)
    assert comparison.difference == pytest.approx(fmean(differences), abs=1e-15)
    z = NormalDist().inv_cdf(0.975)
    assert comparison.half_width == pytest.approx(z * math.sqrt(pvariance(differences) / 100), rel=1e-12, abs=1e-15)


def test_a_difference_exceeds_a_threshold_with_its_whole_interval() -> None:
    for images, only_first, only_second, points in ((1000, 31, 0, 2.0), (1000, 77, 0, 6.0), (100, 4, 0, 0.0)):
        assert Comparison(images, only_first, only_second).exceeds(points)
        fewer = Comparison(images, only_first - 1, only_second)
        assert fewer.level(points) == (False, points > 0.0)
    assert Comparison(1000, 20, 0).level(2.0) == (False, False)  # not more than the threshold
    assert Comparison(1000, 160, 120).level(2.0) == (False, True)
    assert Comparison(1000, 160, 129).level(2.0) == (False, False)  # within chance of no difference
    first, second = torch.tensor([1, 1, 0, 0, 1]) > 0, torch.tensor([1, 0, 1, 0, 0]) > 0
    assert compare_kept(first, second, images=7) == Comparison(7, only_first=2, only_second=1)


def test_a_share_exceeds_a_threshold_by_the_exact_test() -> None:
    for total, share in ((200, 0.005), (200, 0.01), (400, 0.01), (1000, 0.001), (10_000, 0.001), (3, 0.5)):
        # Around the threshold, where the answer changes.
        for count in range(min(int(share * total) + 1, total), min(int(share * total) + 8, total)):
            low = binomtest(count, total).proportion_ci(confidence_level=0.95, method="exact").low
            assert share_exceeds(count, total, share) == (low > share)
