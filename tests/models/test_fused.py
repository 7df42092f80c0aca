"""The fused quantizers against stock Brevitas: values and scales bit for bit, gradients but for rounding."""

from __future__ import annotations

import copy
import math
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.quant import RescalingIntQuant
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from robustq.models.mixed_widths import set_layer_bits
from robustq.models.quant.binary import BinaryWeightQuant
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
        for inside in ALL_WAYS:
            assert inside(g, x, at, torch.tensor(math.inf)).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
            assert inside(g, x, torch.tensor(-math.inf), at).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("threshold", [0.37, 1.01, 93.7])
def test_all_ways_agree_in_bfloat16(threshold: float) -> None:
    """Bounds that bfloat16 does not hold, with numbers of that type on both sides of them."""
    low, high = torch.tensor(-threshold * 1.0001), torch.tensor(threshold)
    near = torch.tensor([-threshold, threshold]).to(torch.bfloat16)
    far = [near]
    for way in (-math.inf, math.inf):
        for _ in range(3):
            far.append(torch.nextafter(far[-1], torch.full_like(near, way)))
    x = torch.cat(far)
    g = torch.arange(1.0, len(x) + 1).to(torch.bfloat16)
    expected = torch.where((x.double() > low) & (x.double() < high), g, 0.0)
    assert 0 < int(expected.count_nonzero()) < len(x)
    for inside in ALL_WAYS:
        found = inside(g, x, low, high)
        assert found.dtype == g.dtype and torch.equal(found, expected)


def test_a_relu_and_its_quantizer_run_as_one_unless_they_have_hooks() -> None:
    layer = QuantReLU(bit_width=4)
    alone = layer(values(1.0))
    joined = layer.act_quant.fused_activation_quant_proxy
    calls: list[str] = []
    for part in ("activation_impl", "tensor_quant"):
        handle = getattr(joined, part).register_forward_hook(lambda *_, part=part: calls.append(part))
        assert torch.equal(layer(values(1.0)), alone)
        handle.remove()
    assert calls == ["activation_impl", "tensor_quant"]
    joined.activation_impl.forward = None  # it is not even called
    assert torch.equal(layer(values(1.0)), alone)


def is_one_function(model: nn.Module) -> bool:
    """Whether nothing but clipping is left of the ReLU in the graph."""
    y = model(values(1.0).requires_grad_())
    return "Quantize" in y.grad_fn.name() and "AccumulateGrad" in y.grad_fn.next_functions[0][0].name()


def test_another_width_and_loaded_weights_are_joined_as_well() -> None:
    """Brevitas makes the quantizer anew in both cases."""
    model = nn.Sequential(QuantReLU(bit_width=4))
    assert is_one_function(model)
    assert not is_one_function(relu(ActQuant, 4))
    set_layer_bits(model, {"0": 2})
    assert is_one_function(model) and len(model(values(1.0)).unique()) == 4
    model.load_state_dict(model.state_dict())
    assert is_one_function(model.eval())
    assert not any(module.training for module in model.modules())
    assert is_one_function(copy.deepcopy(model))


@pytest.mark.parametrize("name", ["joined4", "branch8"])
def test_compiled_code_for_a_cpu_saves_no_bool_tensors_for_the_backward_pass(name: str) -> None:
    """It would store them one by one, which takes longer than all the rest."""
    kept: list[torch.dtype] = []

    def forward_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"].dtype for node in outputs if isinstance(node, torch.fx.Node))
        return graph

    torch.compiler.reset()
    layer, _ = pair(name, 1.0)
    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, _: graph,
        partition_fn=min_cut_rematerialization_partition,  # as inductor does
    )
    for learned in learned_thresholds(layer).values():
        learned.log_threshold.requires_grad_(False)  # as during attack generation, where nothing else needs the input
    mix = torch.eye(50)
    torch.compile(lambda x: layer(x @ mix), fullgraph=True, backend=backend)(values(1.0).requires_grad_())
    for learned in learned_thresholds(layer).values():
        learned.log_threshold.requires_grad_(True)
    assert kept and torch.bool not in kept


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
