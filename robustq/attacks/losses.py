"""What attacks ascend: one number per image, higher is worse for the model.

Losses stay apart per image and attacks differentiate their sum, so that the gradient of an image does not depend on
which images share its batch (a mean would also shrink it by the batch size). Half-precision logits are raised to
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,) int64) -> losses (N,)."""


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
