"""RayS on linear models, whose boundary in every direction is known."""

from __future__ import annotations

import torch
from torch import Tensor

from robustq.attacks import Counted, rays

_GENERATOR = torch.Generator().manual_seed(5)
WEIGHT = torch.randn(30, generator=_GENERATOR) + 0.5  # so that a white image is class 1
X = 0.4 + 0.2 * torch.rand(8, 1, 5, 6, generator=_GENERATOR)
# Boundaries between 0.02 and 0.16 away in the best direction.
OFFSET = (X.flatten(1) @ WEIGHT) + torch.linspace(0.02, 0.16, 8) * WEIGHT.abs().sum()
Y = torch.zeros(8, dtype=torch.int64)


class Decides:
    """Class 1 where w x > the image's offset; it says 1 or 0 and nothing of how near it was."""

    def __init__(self) -> None:
        self.queried: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.queried.append(x)
        wins = x.flatten(1) @ WEIGHT > OFFSET[: len(x)]
        return torch.stack([~wins, wins], dim=1).float()


def undecided(x: Tensor) -> Tensor:
    return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


def one_pixel(x: Tensor) -> Tensor:
    return torch.stack([torch.full((len(x),), 0.5), (x[:, 0, 0, 0] > 0.62).float()], dim=1)


def test_finds_the_nearest_boundary_of_a_linear_model() -> None:
    model = Decides()
    rays(model, X, Y, epsilon=0.01, queries=900)
    # Nothing breaks within 0.01: every image is queried about to the end, and the images tell the best radius.
    images = torch.stack(model.queried[1:])
    wins = images.flatten(2) @ WEIGHT > OFFSET
    size = (images - X).abs().flatten(2).amax(dim=2)
    nearest = torch.where(wins, size, torch.inf).amin(dim=0)
    exact = torch.linspace(0.02, 0.16, 8)
    # Greedy flips on a linear model find each pixel's own sign, up to the search's tolerance of 1e-3 in the radius: a
    # weight whose flip moves the boundary by less is left.
    assert bool((nearest >= exact - 1e-5).all())
    assert bool((nearest <= 1.25 * exact + 3e-3).all())


def test_an_image_breaks_as_soon_as_its_boundary_is_found_inside() -> None:
    model = Decides()
    x_adv = rays(model, X[:4], Y[:4], epsilon=0.16, queries=900, stop_when_broken=False)
    assert bool((x_adv.flatten(1) @ WEIGHT > OFFSET[:4]).all())
    assert float((x_adv - X[:4]).abs().max()) <= 0.16 + 1e-6
    counted = Counted(one_pixel, images=8)
    rays(counted, X, Y, epsilon=0.3, queries=500)
    # One pixel decides; all directions that raise it pass the boundary, and the first one does.
    assert int(counted.queries.max()) <= 12
    assert int(counted.gradient_steps.sum()) == 0


def test_spends_the_queries_that_it_is_given() -> None:
    for queries in (1, 2, 50):
        model = Counted(undecided, images=8)
        x_adv = rays(model, X, Y, epsilon=0.1, queries=queries)
        assert model.queries.tolist() == 8 * [queries + 1]  # and the clean images
        # A model that never decides otherwise: the corner in the first direction.
        torch.testing.assert_close(x_adv, X + 0.1, rtol=0, atol=1e-7)


def test_flips_blocks_of_half_the_size() -> None:
    queried: list[Tensor] = []

    def never(x: Tensor) -> Tensor:
        queried.append(x)
        return undecided(x)

    rays(never, X[:1], Y[:1], epsilon=0.1, queries=100)
    # Without a boundary the directions are tried at distance 1, where every pixel is 0 (flipped) or 1.
    flipped = [tuple((image.flatten() == 0).nonzero()[:, 0].tolist()) for image in queried[1:-1]]
    blocks: list[tuple[int, ...]] = [()]
    for size, count in ((30, 1), (15, 2), (8, 4), (4, 8), (2, 15), (1, 30), (1, 30), (1, 30)):
        blocks += [tuple(range(k * size, min((k + 1) * size, 30))) for k in range(count)]
    assert flipped == blocks[: len(flipped)]
    assert len(flipped) == 99 > 61
