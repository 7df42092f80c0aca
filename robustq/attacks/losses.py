"""What attacks ascend: one number per image, higher is worse for the model.

Losses stay apart per image and attacks differentiate their sum, so that the gradient of an image does not depend on
which images share its batch (a mean would also shrink it by the batch size). Half-precision logits are raised to
float32.
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
    """Cross-entropy, -log softmax(z)_y.

    Args:
        logits: (N, K) float.
        y: (N,) int64, 0 .. K-1.

    Returns:
        (N,) float, not negative.
    """
    return functional.cross_entropy(_full_precision(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus that of the label, max over j != y of z_j - z_y: positive when misclassified.

    Its gradient does not vanish when the model is confident, unlike that of cross-entropy (the loss f_6 of Carlini &
    Wagner 2017, arXiv:1608.04644, without its cut at a confidence). Of several equal runners-up one gets the gradient.

    Args:
        logits: (N, K) float, K at least 2.
        y: (N,) int64, 0 .. K-1.

    Returns:
        (N,) float, any sign.
    """
    logits = _full_precision(logits)
    label = y[:, None]
    runner_up = logits.scatter(1, label, -torch.inf).max(dim=1).values
    return runner_up - logits.gather(1, label)[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (max over j != y of z_j - z_y) / (z_(1) - z_(3)), z_(i) the i-th highest logit.

    The margin over the spread of the three highest logits, so that it depends on neither shift nor scale of the logits
    (Croce & Hein 2020, arXiv:2003.01690, Eq. 6). The ratio has a gradient of its own, also through the divisor.

    With two classes there is no third logit (and the margin over z_(1) - z_(2) would be +-1 everywhere): it is the
    margin then.

    Args:
        logits: (N, K) float, K at least 2.
        y: (N,) int64, 0 .. K-1.

    Returns:
        (N,) float, from -1 to 1 up to rounding for K of at least 3; positive when misclassified.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    highest = _full_precision(logits).topk(3, dim=1).values
    return margin(logits, y) / (highest[:, 0] - highest[:, 2] + _NO_DIVISION_BY_ZERO)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) (arXiv:2003.01690, Eq. 7).

    With fewer than four classes there is no fourth logit: it is the targeted margin z_t - z_y then.

    Args:
        logits: (N, K) float, K at least 2.
        y: (N,) int64, 0 .. K-1.
        target: (N,) int64, another class.

    Returns:
        (N,) float; positive when the target beats the label, which means misclassified.
    """
    if logits.shape[1] < 4:
        return targeted_margin(logits, y, target)
    highest = _full_precision(logits).topk(4, dim=1).values
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return targeted_margin(logits, y, target) / (spread + _NO_DIVISION_BY_ZERO)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus that of the label, z_t - z_y.

    Args:
        logits: (N, K) float.
        y: (N,) int64, 0 .. K-1.
        target: (N,) int64, another class.

    Returns:
        (N,) float; positive when the target beats the label.
    """
    logits = _full_precision(logits)
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of beta * logits, with a factor per image that keeps it from saturating; PGD++'s loss.

    beta is the factor at which the Hessian of cross-entropy with respect to the logits, beta^2 (diag(p) - p p^T) with
    p = softmax(beta z), has the largest Frobenius norm: too small a factor flattens the softmax, too large a one
    saturates it, and the norm vanishes both ways (Hessian norm scaling, Gupta & Ajanthan 2022, arXiv:2003.13511,
    section 4.2). Multiplying all logits by a number thus changes nothing. beta is held constant in the gradient.

    Deviations from the paper, which estimates one factor for a network: here each image has its own, from its own
    logits and of them alone (the paper's Hessian is that with respect to the images), so that no image depends on the
    others of its batch. It is searched where beta times the range of the logits is 0.5 to 100. Constant logits have no
    range, and keep beta = 1.

    Args:
        logits: (N, K) float.
        y: (N,) int64, 0 .. K-1.

    Returns:
        (N,) float, not negative; not to be compared between two answers to the same image, whose factors differ.
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

    Args:
        logits: (N, K) float, of the attacked images.
        clean_logits: (N, K) float, of the clean images.

    Returns:
        (N,) float, not negative up to rounding.
    """
    log_q = functional.log_softmax(_full_precision(logits), dim=1)
    log_p = functional.log_softmax(_full_precision(clean_logits), dim=1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _full_precision(logits: Tensor) -> Tensor:
    """At least float32 (under autocast logits arrive in half precision, where small probabilities vanish)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
