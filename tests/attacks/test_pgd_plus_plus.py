"""PGD++: the factor on the logits against its closed form, and a network that plain cross-entropy cannot attack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import ImageGenerators, pgd, pgd_plus_plus
from robustq.attacks.losses import cross_entropy, rescaled_cross_entropy, unsaturating_factor
from robustq.data import to_float
from tests.models.small_nets import digits, small_spec, trained


@pytest.mark.parametrize("gap", [0.01, 1.0, 1e4])
def test_factor_for_two_classes(gap: float) -> None:
    # beta^2 p (1 - p) is highest where (beta gap / 2) tanh(beta gap / 2) = 1, at beta gap = 2.39936.
    beta = unsaturating_factor(torch.tensor([[0.0, gap], [gap + 3.0, 3.0]]))
    # The grid's factors are 9.4% apart.
    assert beta.tolist() == pytest.approx([2.39936 / gap] * 2, rel=0.05)


def test_factor_is_the_best_of_a_finer_grid() -> None:
    logits = 20 * torch.randn(30, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.logspace(-4, 2, 2000, dtype=torch.float64)

    def hessian_norm(factor: float, z: Tensor) -> float:
        p = (factor * z).softmax(dim=0)
        return float(factor**2 * (torch.diag(p) - torch.outer(p, p)).norm())

    for z, beta in zip(logits, unsaturating_factor(logits).tolist(), strict=True):
        span = float(z.max() - z.min())
        inside = [f for f in grid.tolist() if 0.5 <= f * span <= 100]
        # Half a step of the grid away from the peak loses 2% of it at most.
        assert hessian_norm(beta, z) >= 0.98 * max(hessian_norm(factor, z) for factor in inside)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_loss_does_not_see_the_scale_of_the_logits(factor: float) -> None:
    logits = 5 * torch.randn(30, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(30) % 10
    torch.testing.assert_close(rescaled_cross_entropy(factor * logits, y), rescaled_cross_entropy(logits, y))


def test_constant_and_broken_logits_keep_their_scale() -> None:
    logits = torch.tensor([[2.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    assert unsaturating_factor(logits).tolist() == [1.0, 1.0, 1.0]


def test_rescaling_attacks_what_cross_entropy_cannot() -> None:
    network = trained(small_spec(32))
    images, y = digits()
    x, y = to_float(images)[:100], y[:100]

    def saturated(pictures: Tensor) -> Tensor:
        logits: Tensor = 1e3 * network(pictures)
        return logits

    def left(x_adv: Tensor) -> int:
        with torch.no_grad():
            return int((network(x_adv).argmax(dim=1) == y).sum())

    epsilon, streams = 24 / 255, ImageGenerators.of(0, range(100))
    undefended = left(pgd_plus_plus(network, x, y, epsilon=epsilon, generator=streams))
    rescaled = left(pgd_plus_plus(saturated, x, y, epsilon=epsilon, generator=streams))
    plain = left(pgd_plus_plus(saturated, x, y, epsilon=epsilon, loss=cross_entropy, generator=streams))
    assert plain >= undefended + 10
    # The same attack but for float32's rounding of larger logits.
    assert abs(rescaled - undefended) <= 1
    # Where nothing saturates it is PGD with another weighing of the rivals: no stronger and no weaker.
    assert abs(undefended - left(pgd(network, x, y, epsilon=epsilon, keep_best=True, generator=streams))) <= 4
