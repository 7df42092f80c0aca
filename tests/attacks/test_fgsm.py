"""FGSM on linear models, where the gradient is known: W^T (softmax(z) - onehot(y))."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustq.attacks import fgsm

EPSILON = 8 / 255


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_fgsm_on_a_linear_model(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 12, generator=generator)
    x = torch.rand(20, 3, 2, 2, generator=generator)
    x[0] = 0.0
    x[1] = 1.0
    y = torch.arange(20) % classes

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    # In float64, so that the reference's signs are right; no entry is close enough to 0 for float32 to differ.
    z = x.double().flatten(1) @ weight.double().T
    gradient = ((z.softmax(dim=1) - torch.nn.functional.one_hot(y, classes)) @ weight.double()).view_as(x)
    expected = (x + EPSILON * gradient.sign().float()).clamp(0, 1)
    # Same float32 sum and clamp on both sides: exact.
    assert torch.equal(fgsm(model, x, y, epsilon=EPSILON), expected)


def test_pixel_without_gradient_stays() -> None:
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.full((1, 1, 1, 2), 0.5)
    x_adv = fgsm(lambda x: x.flatten(1) @ weight.T, x, torch.tensor([0]), epsilon=0.25)
    assert x_adv.flatten().tolist() == [0.25, 0.5]
