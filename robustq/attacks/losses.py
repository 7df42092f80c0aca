"""Losses of attacks: one number per image, higher is worse for the model.

Attacks differentiate the sum over the images, so that the gradient of an image does not depend on its batch. All logits
are (N, K) float, labels and targets (N,) int64 in 0 .. K-1, losses (N,). Half-precision logits are raised to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,) int64) -> losses (N,)."""

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,) int64, target classes (N,) int64, none of them the label) -> losses (N,)."""

_NO_DIVISION_BY_ZERO = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, -log softmax(z)_y: (N,), not negative."""
    return functional.cross_entropy(_full_precision(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus that of the label, max over j != y of z_j - z_y: positive when misclassified.

    Its gradient does not vanish when the model is confident, unlike that of cross-entropy (the loss f_6 of Carlini &
    Wagner 2017, arXiv:1608.04644, without its cut at a confidence). Several equal runners-up share the gradient. K is
    at least 2.
    """
    logits = _full_precision(logits)
    label = y[:, None]
    runner_up = logits.scatter(1, label, -torch.inf).amax(dim=1)
    return runner_up - logits.gather(1, label)[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (max over j != y of z_j - z_y) / (z_(1) - z_(3)), z_(i) the i-th highest logit.

    The margin divided by the spread of the three highest logits: invariant to shift and scale of the logits (Croce &
    Hein 2020, arXiv:2003.01690, Eq. 6). The gradient goes through the divisor too. From -1 to 1 up to rounding, for two
    classes the margin; positive when misclassified.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    highest = _full_precision(logits).topk(3, dim=1).values
    return margin(logits, y) / (highest[:, 0] - highest[:, 2] + _NO_DIVISION_BY_ZERO)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) (arXiv:2003.01690, Eq. 7).

    With fewer than four classes it is the targeted margin. Positive when the target beats the label.
    """
    if logits.shape[1] < 4:
        return targeted_margin(logits, y, target)
    highest = _full_precision(logits).topk(4, dim=1).values
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return targeted_margin(logits, y, target) / (spread + _NO_DIVISION_BY_ZERO)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus that of the label, z_t - z_y: positive when the target beats the label."""
    logits = _full_precision(logits)
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of beta * logits, with a factor per image that prevents saturation; the loss of PGD++.

    beta maximises the Frobenius norm of the Hessian of cross-entropy with respect to the logits,
    beta^2 (diag(p) - p p^T) with p = softmax(beta z) (Hessian norm scaling, Gupta & Ajanthan 2022, arXiv:2003.13511,
    section 4.2). Scaling all logits thus changes nothing. beta is held constant in the gradient. The losses of two
    answers to one image do not compare: they have different factors.

    Deviations from the paper, which estimates one factor for a network from the Hessian with respect to the images:
    each image has its own factor, from its own logits, so that it does not depend on its batch. It is searched where
    beta times the range of the logits is 0.5 to 100. Constant logits keep beta = 1.
    """
    logits = _full_precision(logits)
    return cross_entropy(unsaturating_factor(logits)[:, None] * logits, y)


@torch.no_grad()
def unsaturating_factor(logits: Tensor) -> Tensor:
    """The beta of `rescaled_cross_entropy`: (N, K) float -> (N,), positive."""
    z = logits.to(torch.float64)
    span = z.amax(dim=1) - z.amin(dim=1)
    usable = span.isfinite() & (span > 0)
    unit = (z - z.amax(dim=1, keepdim=True)) / torch.where(usable, span, 1.0)[:, None]
    factors = torch.logspace(math.log10(0.5), 2.0, 60, dtype=torch.float64, device=z.device)
    p = (factors[:, None, None] * unit).softmax(dim=2)  # (60, N, K)
    squares = (p * p).sum(dim=2)
    # The squared Frobenius norm of diag(p) - p p^T.
    norm = (p * p * (1.0 - 2.0 * p)).sum(dim=2) + squares * squares
    best = (factors[:, None] ** 4 * norm).nan_to_num(nan=0.0).argmax(dim=0)
    return torch.where(usable, factors[best] / span, 1.0).to(logits.dtype)


def kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of q = softmax(logits) from p = softmax(clean_logits), sum_k p_k log(p_k / q_k).

    That is KL(p || q), the order of TRADES (Zhang et al. 2019, arXiv:1901.08573). With p constant, its gradient with
    respect to `logits` is q - p, the same as that of the cross-entropy of q against the soft labels p.
    """
    log_q = functional.log_softmax(_full_precision(logits), dim=1)
    log_p = functional.log_softmax(_full_precision(clean_logits), dim=1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def nan_to_lowest(losses: Tensor) -> Tensor:
    """Replace NaN by -inf: no later loss would compare as higher than NaN."""
    return losses.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _full_precision(logits: Tensor) -> Tensor:
    """At least float32 (under autocast logits arrive in half precision, where small probabilities vanish)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
