"""FAB and its projection: against linear programming, and where the nearest boundary is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from robustq.attacks import fab, fab_targeted
from robustq.attacks.fab import onto_plane


def by_linear_programming(point: Tensor, normal: Tensor, value: float) -> float | None:
    """The smallest ||d||_inf with value + <normal, d> = 0 and point + d in [0, 1]; None where there is none."""
    size = len(point)
    # Variables d and r, minimise r; d - r <= 0 and -d - r <= 0.
    inequalities = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
    solution = linprog(
        c=[0.0] * size + [1.0],
        A_ub=inequalities,
        b_ub=np.zeros(2 * size),
        A_eq=np.array([[*normal.tolist(), 0.0]]),
        b_eq=[-value],
        bounds=[(-p, 1 - p) for p in point.tolist()] + [(0, None)],
    )
    return float(solution.fun) if solution.success else None


def test_projection_is_the_optimum_of_the_linear_program() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(60, 7, generator=generator, dtype=torch.float64)
    points[:20] = points[:20].round()  # corners: half of the coordinates have no room
    normal = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    normal[::3, 2] = 0.0
    value = 2 * torch.randn(60, generator=generator, dtype=torch.float64)
    change = onto_plane(points, normal, value)
    reached = points + change
    assert float(reached.min()) >= -1e-12 and float(reached.max()) <= 1 + 1e-12
    feasible = 0
    for i in range(60):
        radius = by_linear_programming(points[i], normal[i], float(value[i]))
        rest = float(value[i] + normal[i] @ change[i])
        if radius is None:
            # The corner that comes nearest: nothing is left to move that way.
            room = torch.where(-value[i].sign() * normal[i].sign() > 0, 1 - points[i], points[i])
            assert abs(rest) == pytest.approx(float(value[i].abs() - (normal[i].abs() * room).sum()))
            assert abs(rest) > 0
            continue
        feasible += 1
        assert rest == pytest.approx(0.0, abs=1e-9)
        # The solver's own tolerance.
        assert float(change[i].abs().max()) == pytest.approx(radius, abs=1e-7)
    assert 20 <= feasible <= 55


_WEIGHT = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
_X = 0.3 + 0.4 * torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ _WEIGHT.T


def nearest_boundary() -> tuple[Tensor, Tensor]:
    """The labels that the linear model gives, and the exact distance min_k (z_y - z_k) / ||w_y - w_k||_1."""
    z = linear(_X).double()
    y = z.argmax(dim=1)
    w = _WEIGHT.double()
    distance = (z.gather(1, y[:, None]) - z) / (w[y][:, None, :] - w[None]).abs().sum(dim=2)
    return y, distance.scatter(1, y[:, None], torch.inf).amin(dim=1)


@pytest.mark.parametrize("attack", [fab, fab_targeted])
def test_smallest_change_of_a_linear_model(attack: type) -> None:
    y, distance = nearest_boundary()
    assert 0.001 < float(distance.min()) < float(distance.max()) < 0.2
    # In a ball that holds every boundary, told to go on: the smallest change found is the distance itself, overshot by
    # 5% and stepped back by a tenth, that is within 5% of it.
    found = torch.full((20,), torch.inf, dtype=torch.float64)

    def watched(images: Tensor) -> Tensor:
        logits = linear(images)
        if len(images) == 20:
            wrong = logits.argmax(dim=1) != y
            size = (images.detach().double() - _X).abs().flatten(1).amax(dim=1)
            found[wrong] = torch.minimum(found, size)[wrong]
        return logits

    attack(watched, _X, y, epsilon=0.25, steps=15, stop_when_broken=False)
    ratio = found / distance
    assert float(ratio.min()) >= 1.0 - 1e-5  # float32 images
    assert float(ratio.max()) <= 1.06


@pytest.mark.parametrize("attack", [fab, fab_targeted])
def test_breaks_exactly_the_images_whose_boundary_is_in_the_ball(attack: type) -> None:
    y, distance = nearest_boundary()
    epsilon = float(distance.median()) * 1.001  # just beyond one of the distances
    x_adv = attack(linear, _X, y, epsilon=epsilon, steps=20)
    broken = linear(x_adv).argmax(dim=1) != y
    # FAB lands up to 5% beyond a boundary.
    assert bool(broken[distance < 0.94 * epsilon].all())
    assert not bool(broken[distance > epsilon].any())
    # What stands goes as far as it can towards its nearest misclassified point.
    reach = (x_adv - _X)[~broken].abs().flatten(1).amax(dim=1)
    torch.testing.assert_close(reach, torch.full_like(reach, epsilon), rtol=0, atol=1e-6)
