"""BatchNorm folded on the graph of a custom model, against the unfolded layers and integer arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn

from robustq.models.fx.build import quantized_graph
from robustq.models.fx.fold import fold_graph
from robustq.models.quant.quantizers import Widths, learned_thresholds
from tests.models.fx.custom_nets import CLASSES, NETS, SIDE, float_net, folded_of, graph_of, pixels

ALL = sorted(NETS)
X = pixels().float() / 255


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)}


def norm_behind(graph: GraphModule, layer: str) -> nn.Module | None:
    """The BatchNorm that takes the values of ``layer`` alone, looked up by walking the graph."""
    node = next(node for node in graph.graph.nodes if node.target == layer)
    (user, *others) = node.users
    if others or user.op != "call_module":
        return None
    module: nn.Module = graph.get_submodule(user.target)
    return module if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) else None


@torch.no_grad()
def inputs_and_outputs(graph: GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> its input, and the output of it and its BatchNorm."""
    caught: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: caught.__setitem__(name, inputs[0]))
        for name, layer in layers(graph).items()
    ]
    graph(X)
    for handle in handles:
        handle.remove()
    found = {}
    for name, layer in layers(graph).items():
        norm = norm_behind(graph, name)
        output = layer(caught[name])
        found[name] = (caught[name], output if norm is None else norm(output))
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [8, 2])
def test_no_layer_moves_by_more_than_its_bias_is_rounded(name: str, bits: int) -> None:
    graph = graph_of(name, bits)
    folded = folded_of(name, bits)
    for key, (reached, expected) in inputs_and_outputs(graph).items():
        layer = folded.get_submodule(key)
        with torch.no_grad():
            found = layer(reached)
        unit = layer.bias_quant.tensor_quant.scaling_impl.scale
        unit = unit.reshape(-1, *[1] * (found.dim() - 2))
        # Half a unit of the bias, and float32's rounding in the unfolded layer: 2^-20 of its largest value.
        allowed = 0.5 * unit + expected.abs().max() * 2**-20
        assert ((found - expected).abs() <= allowed).all(), key


GAMMAS = torch.tensor([0.0, -0.0, 1e-12, -1e-12, 1e-4, -1e-4] + [1.0, -1.0] * 5)


@pytest.mark.parametrize("gammas", [GAMMAS, None])
def test_gammas_of_every_kind(gammas: Tensor | None) -> None:
    net = float_net("inverted")
    norm = nn.BatchNorm2d(16, affine=gammas is not None).eval()
    if gammas is not None:
        norm.load_state_dict(net.get_submodule("block.4").state_dict())
        norm.weight.data.copy_(gammas)
    net.get_submodule("block")[4] = norm  # type: ignore[operator]
    graph = quantized_graph(net, name="n", widths=Widths(4, 4), classes=CLASSES, channels=3, image_size=SIDE)
    reached, expected = inputs_and_outputs(graph)["block.3"]
    layer: Any = fold_graph(graph).get_submodule("block.3")
    with torch.no_grad():
        found = layer(reached)
    unit = layer.bias_quant.tensor_quant.scaling_impl.scale.reshape(-1, 1, 1)
    # As promised for channels that are only a bias: 1.6% of it, beside the rounding of the bias.
    slack = expected.abs().max() * 2**-20 if gammas is None else 0.016 * expected.abs() + 1e-5
    assert ((found - expected).abs() <= 0.5 * unit + slack).all()


@pytest.mark.parametrize("name", ALL)
def test_float_networks_fold_too(name: str) -> None:
    graph = graph_of(name, 32)
    with torch.no_grad():
        expected, found = graph(X), fold_graph(graph)(X)
    # float32 through a dozen layers.
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_without_gradients_layers_compute_in_integers(name: str) -> None:
    folded = folded_of(name, 4)
    for key, (reached, _) in inputs_and_outputs(graph_of(name, 4)).items():
        layer = layers(folded)[key]
        with torch.no_grad():
            exact = layer(reached)
        ordinary = layer(reached.clone().requires_grad_())
        assert ordinary.requires_grad
        # The same sums, in float32 and its rounding.
        torch.testing.assert_close(exact, ordinary.detach(), atol=exact.abs().max().item() * 2**-19, rtol=0)
        weights = (layer.weight.double() / layer.weight_quant.tensor_quant.scaling_impl.scale.double()).round()
        unit = layer.bias_quant.tensor_quant.scaling_impl.scale.double()
        # The bias may count in a whole part of the accumulator's step.
        steps = layer.input_scale * layer.weight_quant.tensor_quant.scaling_impl.scale.double().flatten() / unit
        weights = weights * steps.round().reshape(-1, *[1] * (weights.dim() - 1))
        bias = layer.quant_bias().int().double()
        codes = (reached.double() / layer.input_scale).round()
        shape = (-1, *[1] * (exact.dim() - 2))
        if isinstance(layer, nn.Conv2d):
            sums = layer._conv_forward(codes, weights, bias)
        else:
            sums = torch.nn.functional.linear(codes, weights, bias)
        # float64 holds these integers exactly; one rounding to float32, one product.
        assert torch.equal(exact, sums.float() * unit.float().reshape(shape))


def test_float32_counts_only_where_it_is_exact() -> None:
    folded = folded_of("tutorial", 8)
    kinds = {key: layer.accumulator_dtype for key, layer in layers(folded).items()}
    assert torch.float32 in kinds.values()
    largest = layers(folded)["conv1"]
    largest.set_input_scale(1 / 255, largest_code=2**24)
    assert largest.accumulator_dtype is torch.float64
    largest.set_input_scale(1 / 255, largest_code=256)
    assert largest.accumulator_dtype is torch.float32


def test_a_threshold_over_the_bound_of_relu6_counts_as_6_and_can_come_back() -> None:
    graph = graph_of("inverted", 4)
    threshold = next(one for key, one in learned_thresholds(graph).items() if key.startswith("stem.2"))
    threshold.log_threshold.data.fill_(math.log(20.0))
    values = torch.linspace(-3, 40, 500).reshape(1, 1, 20, 25)
    with torch.no_grad():
        before = graph.get_submodule("stem.2")(values)
        after = fold_graph(graph).get_submodule("stem.2")(values)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, (values.clamp(0, 6) / (6 / 15)).round() * (6 / 15), atol=1e-5, rtol=0)
    graph.get_submodule("stem.2")(torch.full((1, 1, 2, 2), 9.0)).sum().backward()
    assert threshold.log_threshold.grad is not None and threshold.log_threshold.grad.abs() > 0
