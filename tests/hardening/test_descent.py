"""The optimiser's step against the same formulas without its short cuts: nothing shared, nothing frozen."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.hardening.methods.registry import build_method
from robustq.hardening.optimization import Descent, build_optimizer
from robustq.recipe import Recipe
from tests.hardening.test_trainer import BATCH, CPU, EPSILON, IMAGES, network, split


def recipe(method: str, **keys: Any) -> Recipe:
    return Recipe(name="test", method=method, epochs=1, batch_size=BATCH, lr=0.05, settings=keys)


def build(settings: Recipe, model: nn.Module) -> Any:
    return build_method(
        settings, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3, teacher=None
    )


@pytest.mark.parametrize("bits", [32, 4, 1])
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("natural", {}),
        ("odgq", {}),
        ("odgq", {"natural_gradient": True, "batch_norm": "train"}),
        ("odgq", {"batch_norm": "joint"}),
        ("pgd", {"steps": 2}),
        ("fgsm-mep", {}),
        ("trades", {"steps": 2}),
    ],
)
def test_short_cuts_change_nothing(
    method: str, keys: dict[str, Any], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(method, **keys)
    model, twin = network(bits).train(), network(bits).train()
    fast, crafted = Descent(model, build(settings, model), settings), []
    perturb = fast.method.perturb

    def seen(*batch: Tensor) -> Tensor:
        crafted.append(perturb(*batch))
        return crafted[-1]

    monkeypatch.setattr(fast.method, "perturb", seen)
    plainly = build(settings, twin)
    optimizer = build_optimizer(twin, settings)
    batch = next(split().batches(BATCH, device=CPU, seed=7))
    # One step: later ones would meet weights that differ in their last bits, where a sign or a rounding may turn.
    outcome = fast.step(batch, epoch=0)
    monkeypatch.setattr("robustq.hardening.methods.method.only_input_gradients", lambda _: nullcontext())
    x_adv = plainly.perturb(batch.x, batch.y, batch.indices)
    expected = plainly.loss(batch.x, x_adv, batch.y, batch.indices)
    optimizer.zero_grad()
    expected.loss.backward()
    optimizer.step()
    assert torch.equal(crafted[0], x_adv)
    assert torch.equal(outcome.loss, expected.loss)
    state: dict[str, Tensor] = twin.state_dict()
    for name, value in model.state_dict().items():
        # Gradients of several passes are added in another order: float32 rounding, times the learning rate.
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6, msg=name)
