"""Counting what attacks ask of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import Counted, apgd, apgd_targeted, fgsm, pgd, pgd_plus_plus, transfer, uniform_noise
from robustq.attacks.base import asked_about
from robustq.errors import UsageError


def sure(x: Tensor) -> Tensor:
    """Class 0, whatever is done to the pixels, with a gradient and four classes."""
    return torch.cat([x.flatten(1)[:, :1] + 9.0, x.flatten(1)[:, :3]], dim=1)


X = torch.full((5, 1, 4, 4), 0.5)
Y = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("attack", "settings", "queries", "gradient_steps"),
    [
        (uniform_noise, {}, 0, 0),
        (fgsm, {}, 0, 1),
        (pgd, {"steps": 7}, 0, 7),
        (pgd, {"steps": 7, "keep_best": True}, 1, 7),
        # The clean image and the last point; a gradient for each step.
        (pgd_plus_plus, {"steps": 7}, 2, 7),
        (apgd, {"steps": 10}, 2, 10),
        (apgd, {"steps": 10, "restarts": 3}, 4, 30),
        (apgd_targeted, {"steps": 10, "target_classes": 2}, 3, 20),
        # Four classes have three others.
        (apgd_targeted, {"steps": 10, "target_classes": 9}, 4, 30),
    ],
)
def test_spent_per_image(attack: object, settings: dict[str, int], queries: int, gradient_steps: int) -> None:
    assert callable(attack)
    model = Counted(sure, images=5)
    attack(model, X, Y, epsilon=8 / 255, **settings)
    assert model.queries.tolist() == 5 * [queries]
    assert model.gradient_steps.tolist() == 5 * [gradient_steps]


def test_an_image_costs_nothing_once_it_is_broken() -> None:
    y = torch.tensor([0, 1, 0, 2, 0])  # images 1 and 3 are wrong as they are
    model = Counted(sure, images=5)
    apgd(model, X, y, epsilon=8 / 255, steps=10)
    assert model.queries.tolist() == [2, 1, 2, 1, 2]
    assert model.gradient_steps.tolist() == [10, 0, 10, 0, 10]


def test_what_surrogates_are_asked_is_counted_too() -> None:
    y = torch.tensor([0, 1, 0, 2, 0])  # images 1 and 3 are wrong as they are
    model, surrogate = Counted(sure, images=5), Counted(sure, images=5)
    transfer(model, X, y, epsilon=8 / 255, surrogates=[surrogate], steps=10)
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


def test_other_models_are_asked_as_they_are() -> None:
    model = nn.Flatten()
    assert asked_about(model, torch.arange(2)) is model


def test_another_number_of_images_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2 images and counts 5.*asked_about"):
        Counted(sure, images=5)(X[:2])
