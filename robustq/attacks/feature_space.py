"""An attack on a layer inside the network rather than on its answer (after Sabour et al. 2016, arXiv:1511.05122).

Training that aligns the features of clean and attacked images (MMD in ODG-Q) can flatten the loss around an image; this
attack asks whether the aligned layer itself can be moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustq.attacks.ball import project, uniform_start
from robustq.attacks.base import AttackState, Criterion, Model, asked_about, input_gradient, step_length
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.errors import UsageError

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (n, C, H, W) -> logits (n, K) and features (n, ...) of one pass, both differentiable.

`hardening.features.FeatureTap` is one, for a layer of any network by its name.
"""


def feature_space(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    features: Features,
    guides: Tensor | None = None,
    step_size: float | None = None,
    steps: int = 50,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD that moves features: away from those of the clean image, or towards those of another image.

    From a uniform start of the ball (at the clean image itself the distance has no slope), each step goes along the
    sign of the gradient of ||f(x_t) - f(x)||^2, or against that of ||f(x_t) - f(guide)||^2. All points of the way
    count. Images that the model misclassifies are returned as they are, the others are dropped as they break
    (`AttackState`).

    Args:
        model: images -> logits; asked about the clean images and the last points.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.
        features: the same network's logits and features. To count its passes wrap it, as in
            `counted_model.sharing(features)`.
        guides: (N, C, H, W), per image the one whose features to move towards, say of another class; None: move away.
        step_size: in the unit of the images; epsilon / 4 if not given.
        steps: how many, at least 1; each costs a forward and a backward pass of an image that stands, and the attack
            three forward passes more.
        stop_when_broken: drop images from the batch when they break; which ones break does not change by it.
        criterion: what counts as broken, where it is not the model's answer to the exact picture (`base.Criterion`).
        generator: a CPU generator, or streams, for the start.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient: a picture that breaks the image if one was met, of these or else
        of all the one with the highest margin.

    Raises:
        UsageError: epsilon or step_size outside [0, 1], steps below 1, guides of another shape than x, a model with
            fewer than two classes, or features without a gradient with respect to the images.
    """
    step = step_length(step_size, epsilon=epsilon, steps=steps)
    if guides is not None and guides.shape != x.shape:
        raise UsageError(f"guides have shape {tuple(guides.shape)} and images {tuple(x.shape)}; give one for each")
    streams = image_generators(generator, x)
    hunt = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = hunt.standing
    if not len(rows):
        return hunt.x_adv
    classes = hunt.clean_logits.shape[1]
    with torch.no_grad():
        reference = _joined(features, rows)(hunt.x[rows] if guides is None else guides[rows])
    reference, sign = reference[:, classes:], 1.0 if guides is None else -1.0
    x_adv = uniform_start(hunt.x[rows], epsilon=epsilon, generator=streams.child("feature space")[rows])
    for _ in range(steps):
        if not len(rows):
            return hunt.x_adv
        objective = partial(_distance, reference=reference, classes=classes, sign=sign)
        slope = input_gradient(_joined(features, rows), x_adv, objective)
        goes_on = hunt.offer(rows, x_adv, slope.logits[:, :classes])
        rows, reference = rows[goes_on], reference[goes_on]
        x_adv = project(x_adv[goes_on] + step * slope.gradient[goes_on].sign(), hunt.x[rows], epsilon=epsilon)
    if len(rows):
        hunt.offer(rows, x_adv, hunt.ask(rows, x_adv))
    return hunt.x_adv


def _joined(features: Features, rows: Tensor) -> Model:
    """Logits and flattened features of these rows, side by side: (n, C, H, W) -> (n, K + D)."""
    asked = asked_about(features, rows)

    def both(pictures: Tensor) -> Tensor:
        logits, found = asked(pictures)
        return torch.cat([logits, found.flatten(1).to(logits.dtype)], dim=1)

    return both


def _distance(joined: Tensor, *, reference: Tensor, classes: int, sign: float) -> Tensor:
    return sign * (joined[:, classes:] - reference).square().sum(dim=1)
