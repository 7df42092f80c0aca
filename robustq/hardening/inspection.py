"""What a network looks like from inside, on images that it has not been trained on: does it resist, or only mask?

Robust accuracy says how much is left; these four say how. Features that grow without bound and margins that grow with
them saturate the loss, so that gradients vanish and attacks that follow them fail on a network that is not robust
(arXiv:1802.00420; the flags ``zero gradient`` and ``logit scale`` of docs/flags.md are raised on the finished model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.hardening.features import FeatureTap

BATCH = 64
"""Images at a time: each needs a backward pass, and a run whose monitor only counts must not need more memory for it
than a small batch of training does."""


@dataclass(frozen=True)
class Inspection:
    """Means over the images.

    Args:
        feature_norm: L2 norm of the features that enter global pooling, average-pooled; None for a network whose global
            pooling is not known.
        logit_margin: logit of the label minus the highest other one; negative where the answer is wrong.
        input_gradient_norm: L2 norm of the gradient of one image's cross-entropy with respect to its pixels in [0, 1].
        zero_gradients: share of images in [0, 1] whose gradient is exactly zero in every pixel.
    """

    feature_norm: float | None
    logit_margin: float
    input_gradient_norm: float
    zero_gradients: float


def inspect_network(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = BATCH) -> Inspection:
    """One forward and one backward pass over the images; no gradient of a weight is computed or touched.

    Args:
        model: images -> logits (n, K) of K > 1 classes, in eval mode: the gradient of an image must not depend on those
            beside it.
        x: (N, C, H, W) float32 in [0, 1] on the model's device, N at least 1.
        y: (N,) int64.
        batch_size: images a pass; decides nothing but the memory.
    """
    tap = _tap(model)
    sums = dict.fromkeys(("feature_norm", "logit_margin", "input_gradient_norm", "zero_gradients"), 0.0)
    for images, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits, features = (model(images), None) if tap is None else tap(images)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), images)
        right = logits.detach().gather(1, labels[:, None])[:, 0]
        others = logits.detach().scatter(1, labels[:, None], float("-inf"))
        norms = gradient.flatten(1).norm(dim=1)
        sums["logit_margin"] += (right - others.amax(dim=1)).sum().item()
        sums["input_gradient_norm"] += norms.sum().item()
        # Of the entries and not of the norm, whose squares underflow for gradients below 1e-23.
        sums["zero_gradients"] += int((gradient.flatten(1) == 0).all(dim=1).sum())
        if features is not None:
            sums["feature_norm"] += features.detach().norm(dim=1).sum().item()
    means = {name: total / len(x) for name, total in sums.items()}
    return Inspection(
        None if tap is None else means["feature_norm"],
        means["logit_margin"],
        means["input_gradient_norm"],
        means["zero_gradients"],
    )


def _tap(model: nn.Module) -> FeatureTap | None:
    try:
        return FeatureTap(model, "pooled")
    except UsageError:
        return None
