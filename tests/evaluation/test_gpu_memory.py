"""Batches that do not fit into a GPU's memory are halved, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import pgd_plus_plus
from robustq.evaluation.accuracy import all_logits
from robustq.evaluation.evaluator import Evaluator
from robustq.evaluation.suites import NamedAttack


class Small:
    """A linear model on a device that holds 3 images, and as many as 5 while a pass takes no gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > (3 if x.requires_grad else 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        logits: Tensor = self.network(x)
        return logits


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (11, 1, 4, 4), generator=generator).float() / 255
    return x, Small().network(x).argmax(dim=1)


def test_predictions() -> None:
    model, (x, _) = Small(), images()
    assert torch.equal(all_logits(model, x, batch_size=8), Small().network(x))
    assert model.sizes == [8, 4, 4, 3]


def test_an_attack() -> None:
    x, y = images()
    attack = NamedAttack("pgd++", pgd_plus_plus, {"steps": 3})
    model, indices = Small(), torch.arange(len(x))
    small = Evaluator(model, x, y, epsilon=0.05, batch_size=8, seed=0)
    found = small.run(attack, model, indices)
    assert small.batch_size == 2
    large = Evaluator(model.network, x, y, epsilon=0.05, batch_size=2, seed=0)
    assert torch.equal(found.kept, large.run(attack, model.network, indices).kept)
    assert 0 < int(found.kept.sum()) < len(x)
    assert torch.equal(small.x_adv, large.x_adv)


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    def model(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        all_logits(model, images()[0], batch_size=8)
