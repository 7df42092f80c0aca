"""One training step: the learning rate in closed form, and options against formulas written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.data import Augment
from robustq.hardening.awp import adversarial_weights
from robustq.hardening.optimization import learning_rate
from robustq.recipe import Recipe
from tests.hardening.tiny import BATCH, CPU, finish, network, recipe, split, training

LR = 0.05


@pytest.mark.parametrize(
    ("keys", "points"),
    [
        ({}, {0: 1.0, 2.5: (1 + math.sqrt(0.5)) / 2, 10 / 3: 0.75, 5: 0.5, 20 / 3: 0.25, 10: 0.0, 11: 0.0}),
        ({"warmup_epochs": 2}, {0: 0.0, 0.5: 0.25, 1: 0.5, 1.5: 0.75, 2: 1.0, 6: 0.5, 10: 0.0}),
        ({"warmup_epochs": 0.5}, {0.25: 0.5, 0.5: 1.0}),
        ({"warmup_epochs": 10}, {5: 0.5}),
        # The tables' schedule of ODG-Q: 150 epochs, a tenth after 50 and after 100.
        (
            {"epochs": 150, "schedule": "steps", "milestones": (50, 100)},
            {0: 1.0, 49.999: 1.0, 50: 0.1, 99.999: 0.1, 100: 0.01, 150: 0.01},
        ),
        (
            {"epochs": 30, "schedule": "steps", "milestones": (10, 20), "warmup_epochs": 4},
            {1: 0.25, 4: 1.0, 10: 0.1, 20: 0.01},
        ),
    ],
)
def test_learning_rate(keys: dict[str, Any], points: dict[float, float]) -> None:
    settings = recipe(**{"epochs": 10, "lr": 0.4, **keys})
    for epochs_done, share in points.items():
        assert learning_rate(settings, epochs_done) == pytest.approx(0.4 * share, rel=1e-15, abs=1e-15), epochs_done
    assert math.isfinite(learning_rate(settings, settings.epochs))


def settings(**keys: Any) -> Recipe:
    return recipe(**{"lr": LR, "schedule": "steps", "weight_decay": 0.01, **keys})


@dataclass
class Options:
    """As in a recipe."""

    label_smoothing: float = 0.0
    clip_gradient: float = 0.0
    awp_gamma: float = 0.0
    awp_warmup_epochs: int = 0


def by_hand(model: nn.Module, options: Options) -> Iterator[dict[str, Tensor]]:
    """Natural training of a float network with every formula written out; the weights after each step."""
    recipe = settings()
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = model(x)
        classes, s = logits.shape[1], options.label_smoothing
        share = torch.full_like(logits, s / classes)
        share[torch.arange(len(y)), y] += 1 - s
        log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
        loss = -(share * log_p).sum() / len(y)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    model.train()
    for epoch in range(recipe.epochs):
        for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch, augment=Augment()):
            at = {name: value.detach().clone() for name, value in parameters.items()}
            if options.awp_gamma and epoch >= options.awp_warmup_epochs:
                kept = {name: value.clone() for name, value in model.named_buffers()}
                ascent = gradients(batch.x, batch.y)
                with torch.no_grad():
                    for name, value in model.named_buffers():
                        value.copy_(kept[name])
                    for name, value in parameters.items():
                        if name.endswith("weight") and value.dim() > 1:
                            length = math.sqrt(value.double().square().sum().item())
                            steepness = math.sqrt(ascent[name].double().square().sum().item())
                            value.add_(ascent[name], alpha=options.awp_gamma * length / steepness)
            descent = gradients(batch.x, batch.y)
            total = math.sqrt(sum(value.double().square().sum().item() for value in descent.values()))
            shorter = min(1.0, options.clip_gradient / total) if options.clip_gradient else 1.0
            with torch.no_grad():
                for name, value in parameters.items():
                    pull = shorter * descent[name] + recipe.weight_decay * at[name]
                    velocity[name] = recipe.momentum * velocity[name] + pull
                    value.copy_(at[name] - LR * velocity[name])
            yield {name: value.detach().clone() for name, value in parameters.items()}


def far(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


CASES = {
    "clip": Options(clip_gradient=0.3),
    "smoothing": Options(label_smoothing=0.2),
    "awp": Options(awp_gamma=0.05),
    "all": Options(label_smoothing=0.1, clip_gradient=0.5, awp_gamma=0.02, awp_warmup_epochs=1),
}


@pytest.mark.parametrize("case", CASES)
def test_training_follows_the_formulas(case: str) -> None:
    options = CASES[case]
    model = network()
    finish(training(model, settings(**vars(options))))
    (*_, want), (*_, plain) = by_hand(network(), options), by_hand(network(), Options())
    got = {name: value.detach() for name, value in model.named_parameters()}
    # Six steps of a ReLU network in float32, whose sums run in another order: 1e-7 grows by a few powers of ten.
    assert far(got, want) < 2e-4
    assert far(plain, want) > 20 * 2e-4  # what the option changes is far from the tolerance


def test_layers_without_gradient_are_not_perturbed() -> None:
    first, second, unused = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(4, 4)
    nn.init.zeros_(first.weight)  # the second layer's input, so its gradient, is 0
    before = unused.weight.detach().clone()
    model = nn.ModuleList([first, second, unused])

    def loss() -> Tensor:
        answer: Tensor = second(first(torch.ones(1, 4)))
        return answer[0, 0]

    with adversarial_weights(model, loss, gamma=0.5):
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert torch.equal(unused.weight, before)
        assert not first.weight.any()
