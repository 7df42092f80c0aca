"""MMD against closed forms and scikit-learn's kernel, and its gradients where they are delicate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from robustq.hardening.methods.mmd import mmd

ESTIMATORS = ["root", "squared"]
BANDWIDTHS: list[Any] = ["median", "mean", "mixture", 2.5]


def features(samples: int, width: int, *, seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype) + shift


def reference(a: Tensor, b: Tensor, *, bandwidth: Any) -> float:
    """MMD^2 in float64 numpy with scikit-learn's kernel exp(-gamma d^2), from the definition."""
    u, v = a.double().numpy(), b.double().numpy()
    joint = np.concatenate([u, v])
    pairs = np.sort([((p - q) ** 2).sum() for i, p in enumerate(joint) for q in joint[:i]])
    median = pairs[(len(pairs) - 1) // 2]
    sigma2s = {
        "median": [median],
        "mean": [pairs.mean()],
        "mixture": [median / 4, median / 2, median, 2 * median, 4 * median],
    }.get(bandwidth, [bandwidth])
    return sum(
        float(rbf_kernel(u, u, gamma).mean() + rbf_kernel(v, v, gamma).mean() - 2 * rbf_kernel(u, v, gamma).mean())
        for gamma in (1 / (2 * sigma2) for sigma2 in sigma2s)
    )


def test_two_single_points() -> None:
    a, b = torch.tensor([[0.0, 0.0]], dtype=torch.float64), torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    # One distance, d^2 = 25: MMD^2 = 2 - 2 exp(-25 / (2 sigma^2)), and sigma^2 is 25 unless it is given.
    squared = 2 - 2 * math.exp(-0.5)
    assert mmd(a, b, estimator="squared").item() == pytest.approx(squared, rel=1e-14)
    assert mmd(a, b, estimator="squared", bandwidth="mean").item() == pytest.approx(squared, rel=1e-14)
    assert mmd(a, b).item() == pytest.approx(math.sqrt(squared + 1e-8), rel=1e-14)
    given = 2 - 2 * math.exp(-25 / 14)
    assert mmd(a, b, estimator="squared", bandwidth=7.0).item() == pytest.approx(given, rel=1e-14)
    mixture = sum(2 - 2 * math.exp(-0.5 / factor) for factor in (0.25, 0.5, 1, 2, 4))
    assert mmd(a, b, estimator="squared", bandwidth="mixture").item() == pytest.approx(mixture, rel=1e-14)


# 3 + 3 and 6 + 5 samples have an odd number of pairs, 4 + 4 and 1 + 7 an even one (lower middle).
@pytest.mark.parametrize(("m", "n"), [(3, 3), (6, 5), (4, 4), (1, 7), (40, 23)])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_equals_scikit_learn(m: int, n: int, bandwidth: Any) -> None:
    a, b = features(m, 8, seed=1), features(n, 8, seed=2, shift=0.5)
    expected = reference(a, b, bandwidth=bandwidth)
    assert expected > 0.01
    # Both in float64; 1e-12 leaves room for the order of a few thousand sums.
    squared = mmd(a, b, estimator="squared", bandwidth=bandwidth)
    assert squared.dtype == torch.float64
    assert squared.item() == pytest.approx(expected, abs=1e-12)
    assert mmd(a, b, bandwidth=bandwidth).item() == pytest.approx(math.sqrt(expected + 1e-8), abs=1e-12)
    # float32: kernel values are off by about 1e-6 (rounded distances over sigma^2), five kernels by five times that.
    single = mmd(a.float(), b.float(), estimator="squared", bandwidth=bandwidth)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_far_from_the_origin_float32_keeps_its_digits(bandwidth: Any) -> None:
    # Features around 1,000 with a spread of 1: |u|^2 is 1e6 times the distances, which an uncentred product would lose.
    # Compared with the same float32 features in float64, so that their own rounding does not count.
    a, b = (features(20, 8, seed=s, shift=1000.0 + 0.5 * s, dtype=torch.float32) for s in (1, 2))
    expected = reference(a, b, bandwidth=bandwidth)
    assert mmd(a, b, estimator="squared", bandwidth=bandwidth).item() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("m", "n"), [(5, 5), (3, 7)])
def test_gradient_at_fixed_bandwidth(estimator: Any, m: int, n: int) -> None:
    a = features(m, 4, seed=1).requires_grad_()
    b = features(n, 4, seed=2, shift=0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, estimator=estimator, bandwidth=3.0), (a, b))


@pytest.mark.parametrize("bandwidth", ["median", "mean", "mixture"])
def test_bandwidth_is_a_constant_for_the_gradient(bandwidth: Any) -> None:
    a, b = features(5, 4, seed=1).requires_grad_(), features(4, 4, seed=2, shift=0.5)
    (gradient,) = torch.autograd.grad(mmd(a, b, estimator="squared", bandwidth=bandwidth), a)
    joint = torch.cat([a.detach(), b])
    pairs = torch.pdist(joint) ** 2
    center = pairs.mean() if bandwidth == "mean" else pairs.median()
    factors = (0.25, 0.5, 1.0, 2.0, 4.0) if bandwidth == "mixture" else (1.0,)
    fixed = [mmd(a, b, estimator="squared", bandwidth=float(center * factor)) for factor in factors]
    (expected,) = torch.autograd.grad(torch.stack(fixed).sum(), a)
    # float64; the bandwidth comes from two different distance formulas.
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_batches(estimator: Any, bandwidth: Any, dtype: torch.dtype) -> None:
    for seed in range(20):
        # Many samples: rounding then leaves MMD^2 below -1e-8 for some of the seeds if nothing holds it.
        a = features(33, 16, seed=seed, dtype=dtype).requires_grad_()
        b = a.detach()[torch.randperm(33, generator=torch.Generator().manual_seed(seed))]
        value = mmd(a, b, estimator=estimator, bandwidth=bandwidth)
        (gradient,) = torch.autograd.grad(value, a)
        # float32: MMD^2 is 0 within 5e-6 as above, and its root is at most sqrt(5e-6).
        assert 0.0 <= value.item() <= (5e-6 if estimator == "squared" else 2.5e-3)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e38])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_all_samples_equal(bandwidth: Any, value: float, dtype: torch.dtype) -> None:
    # Centring must leave exact zeros: the mean of 21 times 0.1 is rounded, and that of 1e38 overflows in float32.
    a = torch.full((10, 37), value, dtype=dtype, requires_grad=True)
    b = torch.full((11, 37), value, dtype=dtype)
    root = mmd(a, b, bandwidth=bandwidth)
    (gradient,) = torch.autograd.grad(root, a)
    # mean() of ones is exact, so MMD^2 is exactly 0.
    assert root.item() == torch.tensor(1e-8, dtype=dtype).sqrt().item()
    assert mmd(a, b, estimator="squared", bandwidth=bandwidth).item() == 0.0
    assert gradient.abs().max() == 0.0


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("bandwidth", ["median", "mixture"])
def test_mostly_equal_samples_keep_a_usable_bandwidth(bandwidth: Any, scale: float) -> None:
    # 39 samples almost in one point, one far away: the median distance is 0 or rounding noise.
    joint = features(1, 16, seed=3, dtype=torch.float32) + 1e-5 * features(40, 16, seed=4, dtype=torch.float32)
    joint[20] += 3.0
    a, b = (scale * joint[:20]).requires_grad_(), scale * joint[20:]
    value = mmd(a, b, estimator="squared", bandwidth=bandwidth)
    (gradient,) = torch.autograd.grad(value, a)
    # At any small width the far sample shares nothing: MMD^2 = 1 + (19^2 + 1) / 400 - 2 * 19 / 20, per kernel.
    kernels = 5 if bandwidth == "mixture" else 1
    assert value.item() == pytest.approx(kernels * (1 + 362 / 400 - 38 / 20), abs=1e-3)
    # At widths a thousand times the distances, samples hardly attract or repel each other (float64: 0.007 for the five
    # kernels). Without the floor it would be 500 in float64.
    assert gradient.abs().max() * scale <= 2e-2


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e16])
@pytest.mark.parametrize("bandwidth", ["median", "mean", "mixture"])
def test_scale_of_the_features_does_not_matter(bandwidth: Any, scale: float) -> None:
    a, b = features(9, 4, seed=1, dtype=torch.float32), features(9, 4, seed=2, shift=0.5, dtype=torch.float32)
    expected = mmd(a, b, bandwidth=bandwidth).item()
    scaled = (a * scale).requires_grad_()
    value = mmd(scaled, b * scale, bandwidth=bandwidth)
    (gradient,) = torch.autograd.grad(value, scaled)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_autocast_changes_nothing(bandwidth: Any) -> None:
    a, b = features(9, 16, seed=1, dtype=torch.float32), features(9, 16, seed=2, shift=0.5, dtype=torch.float32)
    expected = mmd(a, b, bandwidth=bandwidth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mmd(a, b, bandwidth=bandwidth), expected)
        half = mmd(a.bfloat16(), b.bfloat16(), bandwidth=bandwidth)
    assert half.dtype == torch.float32
    assert torch.equal(half, mmd(a.bfloat16().float(), b.bfloat16().float(), bandwidth=bandwidth))
