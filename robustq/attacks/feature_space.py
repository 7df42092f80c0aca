"""An attack on a layer inside the network rather than on its answer (after Sabour et al. 2016, arXiv:1511.05122).

Training that aligns the features of clean and attacked images (MMD in ODG-Q) can flatten the loss around an image. This
attack tests whether the aligned layer itself can be moved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustq.attacks.ball import uniform_start
from robustq.attacks.base import AttackState, Criterion, Model
from robustq.attacks.counted import Counted, model_for
from robustq.attacks.generators import ImageGenerators, image_generators
from robustq.attacks.pgd import default_step, sign_ascent

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (n, C, H, W) -> logits (n, K) and features (n, ...) of one pass, both differentiable: as of
`hardening.features.FeatureTap`, for a layer of any network by its name.
"""


def feature_space(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    features: Features,
    step_size: float | None = None,
    steps: int = 50,
    stop_when_broken: bool = True,
    criterion: Criterion | None = None,
    generator: torch.Generator | ImageGenerators | None = None,
) -> Tensor:
    """PGD that moves the features away from those of the clean image: it ascends ||f(x_t) - f(x)||^2.

    It starts from a uniform point of the ball (at the clean image the distance has no gradient); every iterate counts.
    The model is queried with the clean images and the last iterates.

    Args (the others are those of all attacks, see `robustq.attacks`):
        features: the same network's logits and features; `Counted.sharing(features)` counts its passes.
        steps: each costs a forward and a backward pass; the attack costs three forward passes more.
    """
    step_size = default_step(step_size, epsilon=epsilon, steps=steps)
    generators = image_generators(generator, x)
    state = AttackState(model, x, y, criterion=criterion, stop=stop_when_broken)
    rows = state.remaining
    if not len(rows):
        return state.x_adv
    classes = state.clean_logits.shape[1]
    both = _side_by_side(features)
    with torch.no_grad():
        clean = model_for(both, rows)(state.x[rows])[:, classes:]
    clean_features = clean.new_zeros(len(x), clean.shape[1])
    clean_features[rows] = clean

    def distance(outputs: Tensor, rows: Tensor) -> Tensor:
        return (outputs[:, classes:] - clean_features[rows]).square().sum(dim=1)

    rows, x_adv = sign_ascent(
        both,
        state.x,
        uniform_start(state.x[rows], epsilon=epsilon, generator=generators.child("feature space")[rows]),
        distance,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        rows=rows,
        record=lambda rows, x_adv, outputs: state.record(rows, x_adv, outputs[:, :classes]),
    )
    if len(rows):
        state.record(rows, x_adv, state.query(rows, x_adv))
    return state.x_adv


def _side_by_side(features: Features) -> Model:
    """Logits and flattened features: (n, C, H, W) -> (n, K + D)."""
    if isinstance(features, Counted):
        return features.sharing(_side_by_side(features.model))

    def outputs(images: Tensor) -> Tensor:
        logits, found = features(images)
        return torch.cat([logits, found.flatten(1).to(logits.dtype)], dim=1)

    return outputs
