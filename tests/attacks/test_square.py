"""Square attack and random corners: the schedule, the shapes of what they try, and what they keep."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from robustq.attacks import ATTACKS, ImageGenerators, random_corners, square
from robustq.attacks.square import schedule_of, share
from robustq.errors import UsageError

EPSILON = 8 / 255
X = 0.3 + 0.4 * torch.rand(6, 3, 12, 9, generator=torch.Generator().manual_seed(2))
Y = torch.zeros(6, dtype=torch.int64)
_WEIGHT = torch.randn(X[0].numel(), generator=torch.Generator().manual_seed(3))


def sure(x: Tensor) -> Tensor:
    """Two classes; the margin is linear in the pixels, and class 0 wins whatever they are. Float64: no ties."""
    score = (x.double().flatten(1) * _WEIGHT).sum(dim=1)
    return torch.stack([torch.full_like(score, 1e4), score], dim=1)


def asked_by(attack: str, **settings: int | float) -> list[Tensor]:
    seen: list[Tensor] = []

    def watched(pictures: Tensor) -> Tensor:
        seen.append(pictures.clone())
        return sure(pictures)

    result = ATTACKS[attack](watched, X, Y, epsilon=EPSILON, generator=ImageGenerators.of(0, range(6)), **settings)
    return [*seen, result]


@pytest.mark.parametrize("schedule", [1000, 5000, 10_000])
def test_share_follows_the_paper(schedule: int) -> None:
    # Of 10,000 queries (section 4 and the authors' settings for L-infinity): where p has which value.
    table = {0: 1, 10: 1, 20: 2, 60: 4, 210: 8, 600: 16, 1100: 32, 2100: 64, 4100: 128, 6100: 256, 8100: 512, 9990: 512}
    for place, divisor in table.items():
        assert share(0.8, query=place * schedule // 10_000, schedule=schedule) == 0.8 / divisor


def test_small_pictures_have_a_shorter_schedule() -> None:
    assert schedule_of(3 * 32 * 32) == schedule_of(3 * 224 * 224) == 10_000
    assert schedule_of(3 * 32 * 32 // 8) == 2500
    assert 700 <= schedule_of(64) <= 800
    assert schedule_of(1) >= 1
    # Without another one it is what the attack uses.
    assert torch.equal(
        asked_by("square", queries=40)[-1], asked_by("square", queries=40, schedule=schedule_of(324))[-1]
    )
    assert not torch.equal(asked_by("square", queries=40)[-1], asked_by("square", queries=40, schedule=40)[-1])


def test_stripes_then_one_square_at_a_time() -> None:
    clean, stripes, *tried, result = asked_by("square", queries=300, schedule=300)
    assert torch.equal(clean, X)
    assert len(tried) == 299
    change = stripes - X
    # Columns: one sign for each column and channel, epsilon to a rounding of float32.
    torch.testing.assert_close(change.abs(), torch.full_like(X, EPSILON), rtol=0, atol=1e-7)
    assert torch.equal(change.sign(), change.sign()[:, :, :1].expand_as(X))
    assert 0.2 < float((change[:, :, 0] > 0).float().mean()) < 0.8
    best, highest = stripes, sure(stripes)[:, 1]
    sides = set()
    for query, pictures in enumerate(tried, 1):
        changed = (pictures != best).any(dim=1)
        for image in range(6):
            rows, columns = changed[image].any(dim=1).nonzero()[:, 0], changed[image].any(dim=0).nonzero()[:, 0]
            if not len(rows):
                continue
            side = max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
            sides.add(side)
            assert side <= max(1, min(9, round((share(0.8, query=query, schedule=300) * 108) ** 0.5)))
            patch = pictures[image, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            there = X[image, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            sign = (patch - there).sign().flatten(1)
            inside = changed[image, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten()
            assert bool((sign[:, inside] == sign[:, inside][:, :1]).all())  # one sign for each channel
        score = sure(pictures)[:, 1]
        better = score > highest
        best = torch.where(better[:, None, None, None], pictures, best)
        highest = torch.maximum(highest, score)
    assert sides == {1, 2, 3, 5, 7}  # round(sqrt(p * 108)) of p = 0.4 and its halves; queries 1 and 2 are past p = 0.8
    assert torch.equal(result, best)
    # It climbs: the best corner of this ball is epsilon * ||w||_1 away, and random corners reach a few percent of that.
    gain = highest - sure(X)[:, 1]
    assert float(gain.min()) >= 0.35 * EPSILON * float(_WEIGHT.abs().sum())


def test_squares_reach_every_place() -> None:
    _, _, *tried, _ = asked_by("square", queries=700, schedule=700)
    change = torch.stack([(a != b).any(dim=1) for a, b in zip(tried[1:], tried, strict=False)])
    assert bool(change.any(dim=0)[:, 0].any()) and bool(change.any(dim=0).all())


def test_corners_are_corners_and_the_best_one_is_kept() -> None:
    clean, *tried, result = asked_by("random_corners", corners=20)
    assert torch.equal(clean, X)
    assert len(tried) == 20
    for pictures in tried:
        torch.testing.assert_close((pictures - X).abs(), torch.full_like(X, EPSILON), rtol=0, atol=1e-7)
    scores = torch.stack([sure(pictures)[:, 1] for pictures in tried])
    best = torch.stack(tried)[scores.argmax(dim=0), torch.arange(6)]
    assert torch.equal(result, best)
    signs = torch.stack([(pictures > X).flatten(1) for pictures in tried]).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in signs}) == 120


def test_pixels_stay_in_the_unit_interval() -> None:
    dark = torch.cat([torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)], dim=1)

    def model(pictures: Tensor) -> Tensor:
        assert float(pictures.min()) >= 0.0 and float(pictures.max()) <= 1.0
        score = pictures.flatten(1).sum(dim=1)
        return torch.stack([score + 9, score * 0], dim=1)

    for attack in (partial(square, queries=30), random_corners):
        attack(model, dark, torch.zeros(2, dtype=torch.int64), epsilon=0.3, generator=ImageGenerators.of(0, range(2)))


@pytest.mark.parametrize(
    "settings", [{"queries": 0}, {"schedule": 0}, {"p_init": 0.0}, {"p_init": 1.1}, {"p_init": float("nan")}]
)
def test_impossible_square_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        square(sure, X, Y, epsilon=EPSILON, **settings)  # type: ignore[arg-type]


def test_no_corner_is_refused() -> None:
    with pytest.raises(UsageError, match="corners is 0"):
        random_corners(sure, X, Y, epsilon=EPSILON, corners=0)
