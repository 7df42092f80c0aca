"""APGD against Algorithm 1 of its paper, written image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustq.attacks import ImageGenerators, apgd, apgd_targeted
from robustq.attacks.apgd import checkpoints
from robustq.attacks.base import likely_targets
from robustq.attacks.losses import cross_entropy, dlr, margin, targeted_dlr

EPSILON = 0.1


def test_checkpoints_are_those_of_the_paper() -> None:
    # p_j by hand: 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99.
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9, 10]
    assert sorted(checkpoints(1)) == [1]


_WEIGHT = torch.randn(4, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def curved(x: Tensor) -> Tensor:
    """Four classes with a curved landscape; each image is computed by itself."""
    hidden = (x.double().flatten(1)[:, None, :] * _WEIGHT).sum(dim=2)
    return torch.sin(9.0 * hidden) + 0.3 * torch.cos(23.0 * hidden) + 3.0 * torch.eye(4, dtype=torch.float64)[0]


def by_hand(
    loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: Tensor, *, steps: int
) -> tuple[list[Tensor], int]:
    """Algorithm 1 for one image of class 0: all points, and how often the step was halved."""

    def f(z: Tensor) -> Tensor:
        return loss(curved(z[None]), torch.zeros(1, dtype=torch.int64))[0]

    def gradient(z: Tensor) -> Tensor:
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(leaf), leaf)
        return slope

    def project(z: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(z, x - EPSILON), x + EPSILON).clamp(0, 1)

    p = [0.0, 0.22]
    while p[-1] < 1.0:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checks = [math.ceil(round(place * steps, 9)) for place in p]
    eta, halvings = 2 * EPSILON, 0
    path = [start]
    best, best_value = start, float(f(start))
    now, before = start, start
    eta_at_check, best_at_check = eta, best_value
    rises = 0
    now_value = best_value
    first = True
    for k in range(1, steps + 1):
        z = project(now + eta * gradient(now).sign())
        new = z if first else project(now + 0.75 * (z - now) + 0.25 * (now - before))
        first = False
        value = float(f(new))
        path.append(new)
        rises += value > now_value
        before, now, now_value = now, new, value
        if value > best_value:
            best, best_value = new, value
        if k in checks:
            j = checks.index(k)
            condition1 = rises < 0.75 * (checks[j] - checks[j - 1])
            # At the first checkpoint the step is the first one, and nothing can be said of progress since the last.
            condition2 = j > 1 and eta_at_check == eta and best_at_check == best_value
            eta_at_check, best_at_check = eta, best_value
            if condition1 or condition2:
                eta, halvings = eta / 2, halvings + 1
                now, now_value = best, best_value
            rises = 0
    return path, halvings


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("steps", [10, 50])
def test_every_point_is_that_of_algorithm_1(loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.rand(6, 1, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.int64)
    generators = ImageGenerators.of(0, range(6))
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return curved(images)

    # No class can pass the first one, so that every image stays to the end.
    apgd(watched, x, y, epsilon=EPSILON, steps=steps, loss=loss, generator=generators)
    assert bool((curved(x).argmax(dim=1) == 0).all())
    clean, start, *rest = seen
    assert torch.equal(clean, x)
    # The start touches the edge of the ball, to a rounding of its float32 noise.
    edge = (start - x)[(start > 0) & (start < 1)].abs().max()
    assert float(edge) == pytest.approx(EPSILON, abs=1e-7)
    halvings = 0
    for i in range(6):
        path, halved = by_hand(loss, x[i], start[i], steps=steps)
        halvings += halved
        # float64 throughout: the same sums in another order.
        for number, (theirs, ours) in enumerate(zip(path[1:], rest, strict=True)):
            torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-9, msg=f"image {i}, step {number + 1}")
    assert halvings >= 6


def test_targets_are_the_likely_other_classes() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 4.0, 9.0, 5.5], [0.0, -torch.inf, 1.0, -2.0]])
    y, generators = torch.tensor([0, 2, 1]), ImageGenerators.of(0, range(3))

    def targets(count: int) -> list[list[int]]:
        return torch.stack(likely_targets(logits, y, count=count, generators=generators), dim=1).tolist()

    assert targets(9) == [[2, 1, 3], [3, 0, 1], [2, 0, 3]]
    assert targets(1) == [[2], [3], [2]]


def test_equally_likely_targets_are_in_an_order_of_each_image() -> None:
    logits, y = torch.zeros(600, 4), torch.full((600,), 1)
    logits[:, 1] = 10.0
    found = torch.stack(likely_targets(logits, y, count=3, generators=ImageGenerators.of(0, range(600))), dim=1)
    assert found.sort(dim=1).values.tolist() == [[0, 2, 3]] * 600
    # 200 of each class first, with a standard deviation of 11.5.
    assert all(150 < int((found[:, 0] == target).sum()) < 250 for target in (0, 2, 3))


def test_targeted_runs_ascend_the_target_of_each_image() -> None:
    x = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(8))
    y = torch.zeros(6, dtype=torch.int64)
    asked: list[tuple[int, ...]] = []

    def watched(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        asked.append(tuple(target.tolist()))
        return targeted_dlr(logits, labels, target)

    apgd_targeted(curved, x, y, epsilon=EPSILON, steps=3, loss=watched, generator=ImageGenerators.of(0, range(6)))
    order = curved(x)[:, 1:].argsort(dim=1, descending=True) + 1
    assert asked == [tuple(order[:, rank].tolist()) for rank in range(3) for _ in range(4)]
