"""Weights quantized once a step: the same answers and gradients, from one quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.models.quant.calibration import calibrate
from robustq.models.quant.shared_weights import SharedWeights
from robustq.models.spec import build_model
from tests.models.small_nets import small_spec


def network(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(small_spec(bits))
    calibrate(model, images(), from_scratch=True)
    return model.train()


def images() -> Tensor:
    return torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255


def count_quantizations(model: nn.Module) -> list[int]:
    """One entry for every weight tensor that is quantized from now on."""
    seen: list[int] = []
    for module in model.modules():
        if hasattr(module, "quant_weight"):
            module.weight_quant.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    return seen


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x).logsumexp(dim=1).sum() - model(x.flip(0))[:, 0].sum()).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("bits", [4, 1])
def test_answers_and_gradients_are_the_same(bits: int) -> None:
    model, twin, x = network(bits), network(bits), images()
    seen = count_quantizations(model)
    shared = SharedWeights(model)
    with shared.quantized_once():
        found = gradients(model, x)
        layers = len(seen)
        assert torch.equal(model(x), twin(x.clone()))
    expected = gradients(twin, x)
    assert layers == sum(hasattr(module, "quant_weight") for module in model.modules()) > 5
    assert len(seen) == layers, "two passes forward and one quantization each"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Two passes' gradients are added before the quantizer instead of behind it.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def test_a_pass_without_weight_gradients_leaves_the_graph_to_the_one_that_has_them() -> None:
    model = network(4)
    with SharedWeights(model).quantized_once():
        x = images().requires_grad_()
        model.requires_grad_(False)
        (of_input,) = torch.autograd.grad(model(x).sum(), x)
        model.requires_grad_(True)
        with torch.no_grad():
            model(x)
        model(x).sum().backward()
    assert of_input.abs().sum() > 0
    assert all(value.grad is not None for name, value in model.named_parameters() if name.endswith("conv1.weight"))


def test_afterwards_weights_are_quantized_as_they_are_then() -> None:
    model, x = network(4), images()
    shared = SharedWeights(model)
    with pytest.raises(KeyError), shared.quantized_once():
        raise KeyError
    assert not any("quant_weight" in vars(module) for module in model.modules())
    model.eval()
    before = model(x)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    assert not torch.equal(model(x), before)
    with shared.quantized_once():
        again = model(x)
    assert torch.equal(again, model(x))
