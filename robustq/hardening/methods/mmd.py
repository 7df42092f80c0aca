"""Maximum mean discrepancy between two batches of features: the alignment loss of ODG-Q (Eq. 5, arXiv:2210.08701).

The estimator is the biased one of Gretton et al. 2012 (A Kernel Two-Sample Test, JMLR 13).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustq.errors import UsageError

ESTIMATORS = ("root", "squared")
BANDWIDTHS = ("median", "mean", "mixture")

ROOT_OFFSET = 1e-8  # under the square root, whose slope at 0 is infinite; so the smallest root MMD is 1e-4
MIXTURE = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors on the median squared distance, one kernel each

BANDWIDTH_FLOOR = 1e-4
"""Smallest data-driven sigma^2, as a share of the mean squared distance.

If most features are equal (a collapsed layer) the median is 0 or rounding noise, and so are kernels of that width.
"""


def mmd(a: Tensor, b: Tensor, *, estimator: str = "root", bandwidth: str | float = "median") -> Tensor:
    """Distance between the distributions of two batches of features, under a Gaussian kernel.

    MMD^2 = mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j) over all pairs, i = j included (biased, so never
    negative), with k(u, v) = exp(-|u - v|^2 / (2 sigma^2)).

    The paper writes 1 / (2 sigma) in the exponent and gives no sigma; sigma^2 here is that sigma.

    Args:
        a: (M, D) float features; flatten unpooled ones first.
        b: (N, D) float features, same device; N may differ from M.
        estimator: "root" is sqrt(MMD^2 + 1e-8), Eq. 5 being the unsquared norm; "squared" is MMD^2.
        bandwidth: sigma^2. "median" and "mean": of the squared distances between all pairs of the M + N joint samples,
            without gradient (the lower median; at least 1e-4 of the mean). "mixture": the sum of five kernels with 1/4,
            1/2, 1, 2, 4 times the median. A number: sigma^2 itself.

    Returns:
        Scalar, float32 or (for float64 inputs) float64, with autocast too. "squared" is in [0, 2], or [0, 10] with
        "mixture". Value and gradient are finite for finite features, equal ones included.

    Raises:
        UsageError: not two non-empty (samples, D) batches of equal D, an unknown estimator, or an invalid bandwidth.
    """
    _check(a, b, estimator=estimator, bandwidth=bandwidth)
    # Under autocast the matrix product would have half precision: too little for distances of close features.
    with torch.autocast(device_type=a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        squared_distances = _squared_distances(torch.cat([a.to(dtype), b.to(dtype)]))
        kernel = torch.zeros_like(squared_distances)
        for sigma2 in _sigma2s(squared_distances.detach(), bandwidth):
            kernel = kernel + torch.exp(-squared_distances / (2.0 * sigma2))
        m = len(a)
        mmd2 = kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2.0 * kernel[:m, m:].mean()
        # Rounding may give -1e-7 for equal batches, which ROOT_OFFSET does not compensate.
        mmd2 = mmd2.clamp_min(0.0)
        return mmd2 if estimator == "squared" else torch.sqrt(mmd2 + ROOT_OFFSET)


def _squared_distances(features: Tensor) -> Tensor:
    """(S, D) -> (S, S) squared Euclidean distances, not negative, 0 on the diagonal.

    |u|^2 + |v|^2 - 2 uv by one matrix product: S^2 memory (all differences would need S^2 D, 17 GB for 1,024 unpooled
    features of 4,096), and a gradient without division by a distance, so finite at distance 0. This form (as
    `torch.cdist` above 25 samples) cancels badly for features far from the origin; with centred features the rounding
    error is 1e-7 of the spread (1e-3 with TF32 matrix products). Distances are invariant to the shift, so it needs no
    gradient.
    """
    # By one sample first, then by the mean: equal samples become exactly 0, which the rounded mean alone misses.
    shifted = features - features[:1].detach()
    centred = shifted - shifted.mean(dim=0, keepdim=True).detach()
    gram = centred @ centred.T
    # Norms from the same product, so that the diagonal cancels exactly.
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2.0 * gram).clamp_min(0.0)


def _sigma2s(squared_distances: Tensor, bandwidth: str | float) -> list[Tensor | float]:
    """One sigma^2 per kernel, from the detached (S, S) squared distances."""
    if not isinstance(bandwidth, str):
        return [float(bandwidth)]
    samples = len(squared_distances)
    rows, columns = torch.triu_indices(samples, samples, offset=1, device=squared_distances.device)
    pairs = squared_distances[rows, columns]
    sigma2 = pairs.mean()
    if bandwidth != "mean":
        sigma2 = torch.maximum(pairs.median(), BANDWIDTH_FLOOR * sigma2)
    # All samples equal: avoid 0 / 0; every kernel value is 1 at any width.
    sigma2 = torch.where(sigma2 > torch.finfo(sigma2.dtype).tiny, sigma2, torch.ones_like(sigma2))
    return [sigma2 * factor for factor in MIXTURE] if bandwidth == "mixture" else [sigma2]


def _check(a: Tensor, b: Tensor, *, estimator: str, bandwidth: str | float) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(a) == 0 or len(b) == 0:
        raise UsageError(
            f"mmd: features have shapes {tuple(a.shape)} and {tuple(b.shape)}; give two non-empty batches (samples, D) "
            "of equal D (flatten unpooled features)"
        )
    if estimator not in ESTIMATORS:
        raise UsageError(f"mmd: estimator is {estimator!r}; give 'root' or 'squared'")
    if isinstance(bandwidth, str):
        if bandwidth not in BANDWIDTHS:
            raise UsageError(f"mmd: bandwidth is {bandwidth!r}; give 'median', 'mean', 'mixture' or a number (sigma^2)")
    elif not (math.isfinite(bandwidth) and bandwidth > 0.0):
        raise UsageError(f"mmd: bandwidth is {bandwidth}; sigma^2 must be a positive number")
