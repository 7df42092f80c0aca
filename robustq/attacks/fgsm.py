"""FGSM: one step along the sign of the gradient (Goodfellow et al. 2015, arXiv:1412.6572; Eq. 2 of the ODG-Q paper)."""

from __future__ import annotations

from torch import Tensor

from robustq.attacks.ascent import Model, input_gradient
from robustq.attacks.ball import check_epsilon, project
from robustq.attacks.losses import cross_entropy


def fgsm(model: Model, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """x_adv = clip(x + epsilon * sign(grad_x CE(h(x), y))), clipped to [0, 1].

    A pixel with a gradient of exactly zero stays where it is, since sign(0) = 0. No randomness.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 true labels.
        epsilon: radius of the ball, 0 to 1.

    Returns:
        (N, C, H, W), dtype of `x`, without gradient.

    Raises:
        UsageError: epsilon outside [0, 1], or a model without a gradient with respect to the images.
    """
    check_epsilon(epsilon)
    slope = input_gradient(model, x, lambda logits: cross_entropy(logits, y))
    return project(x + epsilon * slope.gradient.sign(), x, epsilon=epsilon)
