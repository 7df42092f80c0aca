"""Counting right answers, and the interval around the count."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct, predict, wilson_interval

# Not a plain import: scipy (here through scikit-learn) has no type stubs.
binomtest = importlib.import_module("scipy.stats").binomtest


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("total", [1, 2, 10, 360, 1000, 10_000])
def test_wilson_interval_equals_scipy(total: int, confidence: float) -> None:
    for successes in sorted({0, 1, total // 3, total // 2, total - 1, total}):
        expected = binomtest(successes, total).proportion_ci(confidence_level=confidence, method="wilson")
        # The same float64 formula; the normal quantiles come from two libraries and agree to some 1e-15.
        assert wilson_interval(successes, total, confidence=confidence) == pytest.approx(
            (expected.low, expected.high), rel=1e-12, abs=1e-15
        )


def test_wilson_interval_ends_are_exact() -> None:
    # For 9, 13 and 15 images, among others, the formula's float64 rounding misses 1; for others it misses 0.
    for total in range(1, 100):
        assert wilson_interval(0, total)[0] == 0.0
        assert wilson_interval(total, total)[1] == 1.0


def test_wilson_interval_by_hand() -> None:
    # No success in n: high = z^2 / (n + z^2), with z^2 = 3.841459 (the 95% quantile of chi-squared).
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(3.841458820694124 / 13.841458820694124, rel=1e-12)
    mirrored_low, mirrored_high = wilson_interval(10, 10)
    assert mirrored_low == pytest.approx(1 - high, rel=1e-12)
    assert mirrored_high == 1.0


@pytest.mark.parametrize(
    ("successes", "total", "confidence", "named"),
    [
        (0, 0, 0.95, "0 images"),
        (0, -1, 0.95, "-1 images"),
        (-1, 10, 0.95, "-1 correct"),
        (11, 10, 0.95, "11 correct"),
        (5, 10, 0.0, "confidence"),
        (5, 10, 1.0, "confidence"),
        (5, 10, 95.0, "confidence"),
        (5, 10, math.nan, "confidence"),
    ],
)
def test_impossible_counts_are_refused(successes: int, total: int, confidence: float, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        wilson_interval(successes, total, confidence=confidence)


def as_logits(x: Tensor) -> Tensor:
    """Images (N, 1, 1, K) that are their own logits."""
    return x.flatten(1)


LOGITS = torch.tensor(
    [
        [0.1, 0.7, 0.2],
        [0.9, 0.0, 0.9],  # equal: the lowest class
        [0.0, math.nan, 1.0],  # NaN beside the highest
        [math.nan, 0.0, 0.0],
        [0.0, 0.0, math.inf],
        [-math.inf, -math.inf, -3.0],
        [math.nan, math.nan, math.nan],
    ]
)
IMAGES = LOGITS.view(7, 1, 1, 3)
CLASSES = torch.tensor([1, 0, -1, -1, 2, 2, -1])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_predict(batch_size: int) -> None:
    predictions = predict(as_logits, IMAGES, batch_size=batch_size)
    assert predictions.dtype == torch.int64
    assert torch.equal(predictions, CLASSES)


def test_predict_feeds_every_image_once_in_order() -> None:
    seen = []

    def recording(x: Tensor) -> Tensor:
        seen.append(x.flatten().tolist())
        return x.flatten(1)

    predict(recording, torch.arange(5.0).view(5, 1, 1, 1), batch_size=2)
    assert seen == [[0.0, 1.0], [2.0, 3.0], [4.0]]


def test_predict_runs_without_gradient_but_not_in_inference_mode() -> None:
    modes = []
    weight = torch.ones(3, 3, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        logits = x.flatten(1) @ weight
        modes.append((logits.requires_grad, torch.is_inference_mode_enabled(), logits.is_inference()))
        return logits

    predict(model, IMAGES, batch_size=7)
    assert modes == [(False, False, False)]


def test_predict_of_no_images() -> None:
    predictions = predict(as_logits, IMAGES[:0], batch_size=2)
    assert predictions.shape == (0,)
    assert predictions.dtype == torch.int64


@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 3, 1)])
def test_predict_refuses_what_is_no_row_of_logits_per_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="logits must be"):
        predict(lambda x: torch.zeros(shape), IMAGES, batch_size=7)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_predict_refuses_empty_batches(batch_size: int) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        predict(as_logits, IMAGES, batch_size=batch_size)


def test_correct() -> None:
    y = torch.tensor([1, 2, 2, 0, 2, 0, 0])
    right = correct(as_logits, IMAGES, y, batch_size=3)
    assert right.dtype == torch.bool
    assert right.tolist() == [True, False, False, False, True, False, False]


def test_nan_is_wrong_whatever_the_label() -> None:
    assert not correct(as_logits, IMAGES[6:], torch.tensor([-1]), batch_size=1).any()


def test_correct_refuses_missing_labels() -> None:
    with pytest.raises(UsageError, match="7 images and 1 labels"):
        correct(as_logits, IMAGES, torch.tensor([1]), batch_size=3)
