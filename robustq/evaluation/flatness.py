"""Outputs of few values: images whose loss stays the same along a path, as that of one-hot or rounded answers does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.ball import project, round_to_uint8, uniform_start
from robustq.attacks.base import input_gradient
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import cross_entropy, margin
from robustq.data.splits import evenly_spaced
from robustq.evaluation.accuracy import all_logits
from robustq.evaluation.target import Target

IMAGES, POINTS, ENOUGH = 200, 20, 10
"""Images; points of a path; different ones among them that are enough to judge an image."""

SAME = 1e-5
"""Share of an image's largest margin up to which two margins are one value: a straight-through gradient that is written
as a difference of two tensors adds rounding to its answers."""


@dataclass(frozen=True)
class Flatness:
    """Numbers of images with a loss of few values, and of those that were looked at; ``of`` which model."""

    flat: int
    images: int
    of: str


def find_flat(target: Target, x: Tensor, y: Tensor, indices: Tensor, *, epsilon: float) -> Flatness:
    """Images whose margin takes at most half as many values as a path has different points, of up to 200 indices.

    A path has 20 uint8 images: the steps of PGD on cross-entropy, of epsilon / 4, and by turns with them random images
    of the ball, since PGD alone stands still where it has converged. Gradient model and judge answer; the flatter one
    counts.
    """
    rows = indices[evenly_spaced(len(indices), IMAGES)].to(x.device)
    clean, y = x[rows], y[rows]
    if not len(rows):
        return Flatness(0, 0, "the model")
    model = target.gradient_model
    generators = ImageGenerators.of(0, rows, attack="flat loss")
    margins, judged, places = [], [], []
    step, walker = max(epsilon / 4, 1 / 255), clean
    for point in range(POINTS):
        walks = point % 2 == 0
        place = walker
        if not walks:
            random = uniform_start(clean, epsilon=epsilon, generator=generators.child(point))
            place = round_to_uint8(random, clean, epsilon=epsilon)
        gradient, _, logits = input_gradient(model, place, lambda logits: cross_entropy(logits, y))
        margins.append(margin(logits, y))
        if target.query_model is not model:
            judged.append(margin(all_logits(target.query_model, place, batch_size=len(rows)), y.cpu()))
        places.append(place)
        if walks:
            moved = project(walker + step * gradient.sign(), clean, epsilon=epsilon)
            walker = round_to_uint8(moved, clean, epsilon=epsilon)
    weights = torch.linspace(1.0, 2.0, clean[0].numel(), dtype=torch.float64, device=x.device).sqrt()
    different = _values(torch.stack([place.flatten(1).double() @ weights for place in places], dim=1), same=1e-12)
    flat = {"the gradients' model" if judged else "the model": torch.stack(margins, dim=1)}
    if judged:
        flat["the judge"] = torch.stack(judged, dim=1)
    judgeable = different.cpu() >= ENOUGH
    counts = {
        of: int((judgeable & (2 * _values(one.cpu(), same=SAME) <= different.cpu())).sum()) for of, one in flat.items()
    }
    of = max(counts, key=lambda name: counts[name])
    return Flatness(counts[of], len(rows), of)


def _values(numbers: Tensor, *, same: float) -> Tensor:
    """The number of different values in each row of (n, P), to a share of the row's largest: (n,) int64."""
    numbers = numbers.double().nan_to_num(nan=0.0)
    apart = numbers.sort(dim=1).values.diff(dim=1) > same * numbers.abs().amax(dim=1, keepdim=True)
    return 1 + apart.sum(dim=1)
