"""Outputs of few values: images whose loss stays the same along a path, as that of one-hot or rounded answers does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.attacks.ball import project, round_to_uint8
from robustq.attacks.base import input_gradient
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import cross_entropy, margin
from robustq.data.splits import evenly_spaced
from robustq.evaluation.accuracy import all_logits
from robustq.evaluation.target import Target

IMAGES, POINTS = 200, 20

SAME = 1e-4
"""Share of an image's largest margin up to which two margins are one value: a straight-through gradient that is written
as a difference of two tensors adds rounding to its answers."""


@dataclass(frozen=True)
class Flatness:
    """Numbers of images with a loss of few values, and of those that were looked at; ``of`` which model."""

    flat: int
    images: int
    of: str


def find_flat(target: Target, x: Tensor, y: Tensor, indices: Tensor, *, epsilon: float) -> Flatness:
    """Images whose margin takes at most half as many values as a path of PGD has points, of up to 200 indices.

    A path has 20 uint8 images, in steps of epsilon / 4 along the sign of the gradient of cross-entropy; random signs
    where it is zero. Gradient model and judge answer; the flatter one counts.
    """
    rows = indices[evenly_spaced(len(indices), IMAGES)].to(x.device)
    clean, y = x[rows], y[rows]
    if not len(rows):
        return Flatness(0, 0, "the model")
    model = target.gradient_model
    generators = ImageGenerators.of(0, rows, attack="flat loss")
    margins, judged, places = [], [], []
    x_adv = clean
    for point in range(POINTS):
        gradient, _, logits = input_gradient(model, x_adv, lambda logits: cross_entropy(logits, y))
        margins.append(margin(logits, y))
        if target.query_model is not model:
            judged.append(margin(all_logits(target.query_model, x_adv, batch_size=len(rows)), y.cpu()))
        places.append(x_adv)
        signs = generators.child(point).signs(tuple(x.shape[1:])).to(x)
        still = (gradient == 0.0).flatten(1).all(dim=1)[:, None, None, None]
        step = max(epsilon / 4, 1 / 255) * torch.where(still, signs, gradient.sign())
        x_adv = round_to_uint8(project(x_adv + step, clean, epsilon=epsilon), clean, epsilon=epsilon)
    weights = torch.linspace(1.0, 2.0, clean[0].numel(), dtype=torch.float64, device=x.device).sqrt()
    different = _values(torch.stack([place.flatten(1).double() @ weights for place in places], dim=1), same=1e-12)
    flat = {"the gradients' model" if judged else "the model": torch.stack(margins, dim=1)}
    if judged:
        flat["the judge"] = torch.stack(judged, dim=1)
    counts = {of: int((2 * _values(one.cpu(), same=SAME) <= different.cpu()).sum()) for of, one in flat.items()}
    of = max(counts, key=lambda name: counts[name])
    return Flatness(counts[of], len(rows), of)


def _values(numbers: Tensor, *, same: float) -> Tensor:
    """The number of different values in each row of (n, P), to a share of the row's largest: (n,) int64."""
    numbers = numbers.double().nan_to_num(nan=0.0)
    apart = numbers.sort(dim=1).values.diff(dim=1) > same * numbers.abs().amax(dim=1, keepdim=True)
    return 1 + apart.sum(dim=1)
