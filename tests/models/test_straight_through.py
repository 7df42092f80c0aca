"""The fused quantizers against stock Brevitas: values and scales bit for bit, gradients but for rounding."""

from __future__ import annotations

import math
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor, nn

from robustq.models.quant.quantizers import ActQuant, BranchQuant, QuantReLU, WeightQuant, learned_thresholds
from robustq.models.quant.straight_through import (
    FusedIntQuant,
    FusedWeightQuant,
    _inside_anywhere,
    _inside_compiled_on_cpu,
    _inside_on_cpu,
)


class StockActQuant(ActQuant):
    tensor_quant = RescalingIntQuant


class StockBranchQuant(BranchQuant):
    tensor_quant = RescalingIntQuant


def relu(quantizer: Any, bits: int) -> nn.Module:
    layer: nn.Module = qnn.QuantReLU(act_quant=quantizer, bit_width=bits, return_quant_tensor=False)
    return layer


def branch(quantizer: Any, bits: int) -> nn.Module:
    layer: nn.Module = qnn.QuantIdentity(act_quant=quantizer, bit_width=bits, return_quant_tensor=False)
    return layer


PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    **{f"joined{bits}": (QuantReLU(bit_width=bits), relu(StockActQuant, bits)) for bits in (8, 4, 3, 2)},
    "relu4": (relu(ActQuant, 4), relu(StockActQuant, 4)),
    "branch8": (branch(BranchQuant, 8), branch(StockBranchQuant, 8)),
}
each_pair = pytest.mark.parametrize("name", PAIRS)


def pair(name: str, threshold: float) -> tuple[nn.Module, nn.Module]:
    for layer in PAIRS[name]:
        layer.zero_grad()
        for learned in learned_thresholds(layer).values():
            learned.set_threshold(threshold)
    return PAIRS[name]


def values(threshold: float) -> Tensor:
    """(4, 2, 50, 50): far outside of the range, inside, on ties of simple fractions, and the special ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) * threshold
    x[:2000] = torch.arange(-1000, 1000) * threshold / 255 / 2
    x[2000:2006] = torch.tensor([0.0, -0.0, 1e-40, -1e30, 1e30, threshold])
    return x.reshape(4, 2, 50, 50)


@each_pair
@pytest.mark.parametrize("threshold", [1e-6, 0.37, 93.0])
def test_values_are_those_of_stock_brevitas(name: str, threshold: float) -> None:
    fused, stock = pair(name, threshold)
    kinds = [[m for m in layer.modules() if isinstance(m, RescalingIntQuant)] for layer in (fused, stock)]
    assert [type(kind) for (kind,) in kinds] == [FusedIntQuant, RescalingIntQuant]
    x = values(threshold)
    assert torch.equal(fused(x), stock(x))
    assert torch.equal(fused(x.to(memory_format=torch.channels_last)), stock(x))
    assert torch.equal(fused(x[:, :, ::2, 1:]), stock(x[:, :, ::2, 1:]))


@each_pair
def test_values_that_are_not_finite(name: str) -> None:
    fused, stock = pair(name, 1.0)
    x = torch.tensor([math.nan, math.inf, -math.inf]).reshape(1, 1, 1, 3)
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=0, equal_nan=True)


@each_pair
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("threshold", [0.37, 93.0])
def test_gradients_are_those_of_stock_brevitas(name: str, threshold: float, layout: torch.memory_format) -> None:
    upstream = torch.randn(4, 2, 50, 50, generator=torch.Generator().manual_seed(1))
    found = []
    for layer in pair(name, threshold):
        x = values(threshold).to(memory_format=layout).requires_grad_()
        (layer(x) * upstream).sum().backward()
        (learned,) = learned_thresholds(layer).values()
        assert x.grad is not None and learned.log_threshold.grad is not None
        found.append((x.grad, learned.log_threshold.grad))
    (of_x, of_threshold), (stock_of_x, stock_of_threshold) = found
    # Stock multiplies by the scale and divides by it: one float32 rounding each. Zero stays zero.
    torch.testing.assert_close(of_x, stock_of_x, rtol=2.0**-22, atol=0)
    assert int((stock_of_x == 0).sum()) > 1000
    # Float32 sums of 20,000 terms of either sign, which leave about a hundredth of what was added up.
    assert of_threshold.item() == pytest.approx(stock_of_threshold.item(), rel=1e-3)


ALL_WAYS = (_inside_anywhere, _inside_on_cpu, _inside_compiled_on_cpu)


def test_numbers_next_to_a_bound_and_infinite_ones() -> None:
    """Compiled code takes the sign of a difference, which must be exact down to the smallest float."""
    for bound in (0.0, 1e-38, 0.1, 93.7 * 15.5):
        at = torch.tensor(bound)
        x = torch.stack([*(torch.nextafter(at, torch.tensor(way)) for way in (-math.inf, math.inf)), at])
        x = torch.cat([x, torch.tensor([-math.inf, math.inf])])
        g = torch.ones(5)
        # By scale 1: otherwise the quotient or the bound is rounded.
        one = torch.tensor(1.0)
        for inside in ALL_WAYS:
            assert inside(g, x, one, at.item(), math.inf).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
            assert inside(g, x, one, -math.inf, at.item()).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_all_ways_agree_where_no_number_lies_at_a_bound() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    g, scale = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), torch.tensor(0.0371)
    for low, high in ((-8.5, 7.5), (0.0, 15.5)):
        first, *others = (inside(g, x, scale, low, high) for inside in ALL_WAYS)
        assert 0 < int((first == 0).sum()) < x.numel()
        assert all(torch.equal(first, other) for other in others)


# --- weights ---------------------------------------------------------------------------------------------------------


class StockWeightQuant(WeightQuant):
    tensor_quant = RescalingIntQuant


def weight_layers(bits: int, kind: str, weight: Tensor) -> list[Any]:
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
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_and_scales_are_those_of_stock_brevitas(bits: int, kind: str) -> None:
    fused, stock = (layer.quant_weight() for layer in weight_layers(bits, kind, weights(kind)))
    assert torch.equal(fused.value, stock.value)
    assert torch.equal(fused.scale.flatten(), stock.scale.flatten()) and fused.scale.shape == stock.scale.shape
    assert torch.equal(fused.zero_point, stock.zero_point) and torch.equal(fused.bit_width, stock.bit_width)
    assert torch.equal(fused.int(), stock.int())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 2])
def test_gradients_of_weights_are_those_of_stock_brevitas(bits: int, kind: str) -> None:
    w = weights(kind)
    draws = torch.Generator().manual_seed(1)
    upstream = torch.randn(w.shape, generator=draws)
    of_scale = torch.randn(9, generator=draws)
    found = []
    for layer in weight_layers(bits, kind, w):
        quantized = layer.quant_weight()
        ((quantized.value * upstream).sum() + (quantized.scale.flatten() * of_scale).sum()).backward()
        found.append(layer.weight.grad)
    fused, stock = found
    # A sum over a channel and back, in another order; the smallest scale of stock divides by 1e-10 twice.
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-5)
