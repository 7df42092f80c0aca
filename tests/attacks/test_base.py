"""Query and gradient counts, and the input gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import Counted, apgd, apgd_targeted, fgsm, pgd, pgd_plus_plus, tpgd, transfer, uniform_noise
from robustq.attacks.base import input_gradient
from robustq.attacks.counted import model_for
from robustq.attacks.losses import margin
from robustq.errors import UsageError


def sure(x: Tensor) -> Tensor:
    """Class 0, whatever is done to the pixels, with a gradient and four classes."""
    return torch.cat([x.flatten(1)[:, :1] + 9.0, x.flatten(1)[:, :3]], dim=1)


X = torch.full((5, 1, 4, 4), 0.5)
Y = torch.zeros(5, dtype=torch.int64)
TWO_WRONG = torch.tensor([0, 1, 0, 2, 0])  # images 1 and 3 are wrong as they are


@pytest.mark.parametrize(
    ("attack", "settings", "queries", "gradient_steps"),
    [
        (uniform_noise, {}, 0, 0),
        (fgsm, {}, 0, 1),
        (pgd, {"steps": 7}, 0, 7),
        (pgd, {"steps": 7, "keep_best": True}, 1, 7),
        (tpgd, {"steps": 7}, 1, 7),
        # The clean image and the last point; a gradient for each step.
        (pgd_plus_plus, {"steps": 7}, 2, 7),
        (apgd, {"steps": 10, "restarts": 3}, 4, 30),
        # Four classes have three others.
        (apgd_targeted, {"steps": 10, "target_classes": 9}, 4, 30),
    ],
)
def test_counts_per_image(attack: Any, settings: dict[str, Any], queries: int, gradient_steps: int) -> None:
    model = Counted(sure, images=5)
    attack(model, X, Y, epsilon=8 / 255, **settings)
    assert model.queries.tolist() == 5 * [queries]
    assert model.gradient_steps.tolist() == 5 * [gradient_steps]


def test_broken_images_cost_nothing_and_surrogates_are_counted() -> None:
    model = Counted(sure, images=5)
    apgd(model, X, TWO_WRONG, epsilon=8 / 255, steps=10)
    assert model.queries.tolist() == [2, 1, 2, 1, 2]
    assert model.gradient_steps.tolist() == [10, 0, 10, 0, 10]
    model, surrogate = Counted(sure, images=5), Counted(sure, images=5)
    transfer(model, X, TWO_WRONG, epsilon=8 / 255, surrogates=[surrogate], steps=10)
    assert model.queries.tolist() == [2, 1, 2, 1, 2]
    assert surrogate.queries.tolist() == [2, 0, 2, 0, 2]
    assert surrogate.gradient_steps.tolist() == [10, 0, 10, 0, 10]


def test_rows_of_rows() -> None:
    model = Counted(sure, images=5)
    part = model.for_rows(torch.tensor([4, 0, 2])).for_rows(torch.tensor([True, False, True]))
    part(X[:2])
    assert model.queries.tolist() == [0, 0, 1, 0, 1]
    leaf = X[:2].clone().requires_grad_()
    assert torch.equal(part(leaf), sure(X[:2]))
    with torch.no_grad():
        part(leaf)
    assert model.gradient_steps.tolist() == [0, 0, 1, 0, 1]
    assert model.queries.tolist() == [0, 0, 2, 0, 2]
    other = nn.Flatten()
    assert model_for(other, torch.arange(2)) is other
    with pytest.raises(UsageError, match=r"2 images and counts 5.*model_for"):
        model(X[:2])


def test_input_gradient_of_a_linear_model() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    found = input_gradient(
        lambda x: x.flatten(1) * torch.tensor([2.0, 4.0]), x, lambda z: margin(z, torch.tensor([0, 1]))
    )
    assert found.logits.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert found.losses.tolist() == [1.0, -1.0]
    assert found.gradient.flatten(1).tolist() == [[-2.0, 4.0], [2.0, -4.0]]
    assert not any(part.requires_grad for part in found)
