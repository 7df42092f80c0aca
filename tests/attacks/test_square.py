"""Square attack: the schedule, the shapes of its queries, and the image that it keeps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from robustq.attacks import ImageGenerators, square
from robustq.attacks.square import share

EPSILON = 8 / 255
X = 0.3 + 0.4 * torch.rand(6, 3, 12, 9, generator=torch.Generator().manual_seed(2))
Y = torch.zeros(6, dtype=torch.int64)
_WEIGHT = torch.randn(X[0].numel(), generator=torch.Generator().manual_seed(3))


def sure(x: Tensor) -> Tensor:
    """Two classes; the margin is linear in the pixels, and class 0 wins whatever they are. Float64: no ties."""
    score = (x.double().flatten(1) * _WEIGHT).sum(dim=1)
    return torch.stack([torch.full_like(score, 1e4), score], dim=1)


def queries_and_result(monkeypatch: pytest.MonkeyPatch, *, queries: int) -> list[Tensor]:
    """The squares shrink over as many queries as there are."""
    monkeypatch.setattr(importlib.import_module("robustq.attacks.square"), "schedule_of", lambda size: queries)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return sure(x)

    result = square(watched, X, Y, epsilon=EPSILON, queries=queries, generator=ImageGenerators.of(0, range(6)))
    return [*seen, result]


@pytest.mark.parametrize("schedule", [1000, 10_000])
def test_share_follows_the_paper(schedule: int) -> None:
    # Of 10,000 queries (section 4 and the authors' settings for L-infinity): where p has which value.
    table = {0: 1, 10: 1, 20: 2, 60: 4, 210: 8, 600: 16, 1100: 32, 2100: 64, 4100: 128, 6100: 256, 8100: 512, 9990: 512}
    for query, divisor in table.items():
        assert share(query=query * schedule // 10_000, schedule=schedule) == 0.8 / divisor


def test_stripes_then_one_square_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, stripes, *tried, result = queries_and_result(monkeypatch, queries=300)
    assert torch.equal(clean, X)
    assert len(tried) == 299
    change = stripes - X
    # Columns: one sign for each column and channel, epsilon to a rounding of float32.
    torch.testing.assert_close(change.abs(), torch.full_like(X, EPSILON), rtol=0, atol=1e-7)
    assert torch.equal(change.sign(), change.sign()[:, :, :1].expand_as(X))
    assert 0.2 < float((change[:, :, 0] > 0).float().mean()) < 0.8
    best, highest = stripes, sure(stripes)[:, 1]
    sides = set()
    for query, images in enumerate(tried, 1):
        changed = (images != best).any(dim=1)
        for image in range(6):
            rows, columns = changed[image].any(dim=1).nonzero()[:, 0], changed[image].any(dim=0).nonzero()[:, 0]
            if not len(rows):
                continue
            side = max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
            sides.add(side)
            assert side <= max(1, min(9, round((share(query=query, schedule=300) * 108) ** 0.5)))
            patch = images[image, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            there = X[image, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            sign = (patch - there).sign().flatten(1)
            inside = changed[image, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten()
            assert bool((sign[:, inside] == sign[:, inside][:, :1]).all())  # one sign for each channel
        score = sure(images)[:, 1]
        best = torch.where((score > highest)[:, None, None, None], images, best)
        highest = torch.maximum(highest, score)
    assert sides == {1, 2, 3, 5, 7}  # round(sqrt(p * 108)) of p = 0.4 and its halves; queries 1 and 2 are past p = 0.8
    assert torch.equal(result, best)
    # It climbs: the best corner of this ball is epsilon * ||w||_1 away, and random corners reach a few percent of that.
    gain = highest - sure(X)[:, 1]
    assert float(gain.min()) >= 0.35 * EPSILON * float(_WEIGHT.abs().sum())


def test_squares_reach_every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, *tried, _ = queries_and_result(monkeypatch, queries=700)
    change = torch.stack([(a != b).any(dim=1) for a, b in zip(tried[1:], tried, strict=False)])
    assert bool(change.any(dim=0).all())
