"""The fused weight quantizers against stock Brevitas: values and scales bit for bit, gradients but for rounding."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor, nn

from robustq.models.quant.binary import BinaryWeightQuant
from robustq.models.quant.fused import FusedWeightQuant
from robustq.models.quant.quantizers import WeightQuant

BITS = (8, 4, 3, 2)


class StockWeightQuant(WeightQuant):
    tensor_quant = RescalingIntQuant


def layers(bits: int, kind: str, weight: Tensor) -> list[Any]:
    """The same layer twice: ours and stock."""
    made: list[Any] = []
    for quantizer, expected in ((WeightQuant, FusedWeightQuant), (StockWeightQuant, RescalingIntQuant)):
        options = {"weight_quant": quantizer, "weight_bit_width": bits, "bias": False}
        layer: Any = (
            qnn.QuantLinear(weight.shape[1], weight.shape[0], **options)
            if kind == "linear"
            else qnn.QuantConv2d(weight.shape[1], weight.shape[0], weight.shape[2], **options)
        )
        assert type(layer.weight_quant.tensor_quant) is expected
        with torch.no_grad():
            layer.weight.copy_(weight)
        made.append(layer.to(memory_format=torch.channels_last) if kind == "channels_last" else layer)
    return made


def weights(kind: str, seed: int = 0) -> Tensor:
    """Channels of sizes far apart, one of zeros, one below the smallest scale, one of a single weight."""
    draws = torch.Generator().manual_seed(seed)
    shape = (9, 20) if kind == "linear" else (9, 6, 3, 3)
    w = torch.randn(shape, generator=draws)
    sizes = torch.tensor([1e-12, 0.0, 1e-6, 0.01, 0.1, 1.0, 30.0, 1e6, 1.0])
    w = w * sizes.reshape(-1, *(1 for _ in shape[1:]))
    w[8] = 0.0
    w[8].view(-1)[3] = -0.7
    return w


KINDS = ("conv", "channels_last", "linear")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_values_and_scales_are_those_of_stock_brevitas(bits: int, kind: str) -> None:
    fused, stock = (layer.quant_weight() for layer in layers(bits, kind, weights(kind)))
    assert torch.equal(fused.value, stock.value)
    assert torch.equal(fused.scale.flatten(), stock.scale.flatten()) and fused.scale.shape == stock.scale.shape
    assert torch.equal(fused.zero_point, stock.zero_point) and torch.equal(fused.bit_width, stock.bit_width)
    assert torch.equal(fused.int(), stock.int())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_stock_brevitas(bits: int, kind: str) -> None:
    w = weights(kind)
    draws = torch.Generator().manual_seed(1)
    upstream = torch.randn(w.shape, generator=draws)
    of_scale = torch.randn(9, generator=draws)
    found = []
    for layer in layers(bits, kind, w):
        quantized = layer.quant_weight()
        ((quantized.value * upstream).sum() + (quantized.scale.flatten() * of_scale).sum()).backward()
        found.append(layer.weight.grad)
    fused, stock = found
    # A sum over a channel and back, in another order; the smallest scale of stock divides by 1e-10 twice.
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-5)


def test_a_shared_largest_magnitude_moves_one_weight() -> None:
    """As stock has it: the first of equals."""
    w = torch.tensor([[0.5, -0.5, 0.2]])
    found = []
    for layer in layers(4, "linear", w):
        (layer.quant_weight().value * torch.tensor([[0.0, 0.0, 1.0]])).sum().backward()
        found.append(layer.weight.grad)
    assert found[0].count_nonzero() == 2
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_binary_scales_are_those_of_brevitas(kind: str) -> None:
    w = weights(kind)
    options: dict[str, Any] = {"weight_quant": BinaryWeightQuant, "bias": False}
    layer: Any = qnn.QuantLinear(20, 9, **options) if kind == "linear" else qnn.QuantConv2d(6, 9, 3, **options)
    with torch.no_grad():
        layer.weight.copy_(w)
    if kind == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    quantizer = layer.weight_quant.tensor_quant
    value, scale, _, _ = quantizer(layer.weight)
    by_brevitas = quantizer.scaling_impl(layer.weight)
    assert torch.equal(scale, by_brevitas) and scale.shape == by_brevitas.shape
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    ((value * upstream).sum() + scale.sum()).backward()
    signs = torch.where(w >= 0, 1.0, -1.0)
    exact = w.clone().requires_grad_()
    alpha = exact.reshape(9, -1).abs().mean(dim=1).reshape(scale.shape)
    ((alpha * signs * upstream).sum() + alpha.sum()).backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    torch.testing.assert_close(layer.weight.grad, exact.grad + upstream, rtol=1e-4, atol=1e-5)


each_quantizer = pytest.mark.parametrize(
    "options",
    [{"weight_quant": WeightQuant, "weight_bit_width": 4}, {"weight_quant": BinaryWeightQuant}],
    ids=("4 bits", "1 bit"),
)


@each_quantizer
def test_a_weight_that_is_not_a_number_stays_none(options: dict[str, Any]) -> None:
    layer: Any = qnn.QuantLinear(4, 2, bias=False, **options)
    with torch.no_grad():
        layer.weight[0, 1] = torch.nan
    value = layer.quant_weight().value
    assert value[0].isnan().any() and value[1].isfinite().all()


@each_quantizer
def test_compilers_see_one_graph(options: dict[str, Any]) -> None:
    layer: Any = qnn.QuantLinear(20, 9, bias=False, **options)
    with torch.no_grad():
        layer.weight.copy_(weights("linear"))
    module: nn.Module = layer.weight_quant.tensor_quant
    found = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        w = layer.weight.detach().clone().requires_grad_()
        value, scale = function(w)[:2]
        (value.square().sum() + scale.sum()).backward()
        assert w.grad is not None
        found.append((value.detach(), scale.detach(), w.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
