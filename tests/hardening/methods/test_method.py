"""Attack generation computes the gradient of the images, and none for the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustq.hardening.methods.method import attack_generation
from robustq.hardening.methods.settings import BATCH_NORM_MODES
from robustq.models.quant.quantizers import learned_thresholds
from tests.models.test_shared_weights import images, network


@pytest.mark.parametrize("mode", BATCH_NORM_MODES)
@pytest.mark.parametrize("bits", [32, 4, 1])
def test_the_input_gets_the_same_gradient_and_nothing_else_one(mode: str, bits: int) -> None:
    model, twin = network(bits), network(bits)
    twin.train(mode != "eval")
    x, of_twin = images().requires_grad_(), images().requires_grad_()
    with attack_generation(model, mode):
        loss = model(x).logsumexp(dim=1).sum()
        loss.backward()
    twin(of_twin).logsumexp(dim=1).sum().backward()
    assert x.grad is not None and of_twin.grad is not None
    # Convolutions may take another kernel where no weight gradient is wanted.
    torch.testing.assert_close(x.grad, of_twin.grad, rtol=1e-5, atol=1e-6 * float(of_twin.grad.abs().max()))
    assert all(value.grad is None for value in model.parameters())
    assert any(value.grad is not None for value in twin.parameters())


def test_only_what_asked_before_asks_again() -> None:
    model = network(4)
    fixed = next(iter(learned_thresholds(model).values())).log_threshold.requires_grad_(False)
    asking = [name for name, value in model.named_parameters() if value.requires_grad]
    with pytest.raises(KeyError), attack_generation(model, "separate"):
        assert not any(value.requires_grad for value in model.parameters())
        raise KeyError
    assert [name for name, value in model.named_parameters() if value.requires_grad] == asking
    assert not fixed.requires_grad
    assert all(
        norm.track_running_stats and norm.training for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)
    )
