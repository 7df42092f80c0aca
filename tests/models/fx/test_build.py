"""The whole way from a float network to a quantized one, over networks as users write them."""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import nn

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import Widths, learned_thresholds
from tests.models.fx.custom_nets import CLASSES, NETS, SIDE, float_net, graph_of, pixels

ALL = sorted(NETS)
X = pixels().float() / 255

FIRST = {"tutorial": {"conv1"}, "normalising": {"stem"}, "inverted": {"stem.0"}, "branching": {"left", "right"}}
FIRST["gated"] = {"conv1.0"}
FIRST["splitting"] = {"stem"}
LAST = {
    "splitting": {"head"},
    "tutorial": {"fc3"},
    "normalising": {"fc"},
    "inverted": {"classifier.1"},
    "branching": {"fc"},
    "gated": {"last"},
}


def activations(model: nn.Module) -> dict[str, torch.Tensor]:
    """Quantizer name -> what it gave for X."""
    caught: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: caught.__setitem__(name, output.detach()))
        for name, module in model.named_modules()
        if isinstance(module, qnn.QuantReLU | qnn.QuantIdentity)
    ]
    with torch.no_grad():
        model(X)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("name", ALL)
def test_float_is_the_users_network_bit_for_bit(name: str) -> None:
    net = float_net(name)
    with torch.no_grad():
        expected = net(X)
        assert torch.equal(graph_of(name, 32)(X), expected)


@pytest.mark.parametrize("name", ["normalising", "branching"])
def test_float_trains_bit_for_bit_as_the_users_network(name: str) -> None:
    """The two networks without dropout: batch statistics, running statistics and gradients."""
    net = float_net(name).train()
    graph = graph_of(name, 32).train()
    for model in (net, graph):
        model(X).square().sum().backward()
    state, expected = graph.state_dict(), net.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    gradients = dict(graph.named_parameters())
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", ALL)
def test_names_of_the_state_dict_stay(name: str) -> None:
    expected = set(float_net(name).state_dict())
    assert set(graph_of(name, 32).state_dict()) == expected
    graph = graph_of(name, 4)
    added = {f"{key}.log_threshold" for key in learned_thresholds(graph)}
    assert set(graph.state_dict()) == expected | added


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("bits", "act_bits"), [(8, 8), (3, 2), (2, 4)])
def test_levels(name: str, bits: int, act_bits: int) -> None:
    graph = graph_of(name, bits, act_bits=act_bits)
    for key, module in graph.named_modules():
        if isinstance(module, qnn.QuantConv2d | qnn.QuantLinear):
            own = 8 if key in FIRST[name] | LAST[name] else bits
            codes = module.quant_weight().int()
            assert codes.abs().max() == 2 ** (own - 1) - 1, f"{key}: the largest weight of a channel is its last code"
    for key, values in activations(graph).items():
        module = graph.get_submodule(key)
        scale = module.act_quant.scale().item()
        codes = values / scale
        # Codes are whole up to the rounding of one float32 product and one quotient.
        torch.testing.assert_close(codes, codes.round(), atol=codes.abs().max().item() * 2**-22, rtol=0)
        if isinstance(module, qnn.QuantReLU):
            width = act_bits if key in inner_rectifiers(name) else 8
            assert codes.min() >= 0 and codes.max().round() <= 2**width - 1
            assert width == 8 or codes.max().round() > 2 ** (width - 1) - 1, f"{key} is narrower than {width} bits"


def inner_rectifiers(name: str) -> set[str]:
    """Rectifiers whose values an inner layer takes; written down by hand from the networks."""
    return {
        "tutorial": {"relu", "relu_1", "relu_2"},
        "normalising": {"relu", "relu_2"},
        "inverted": {"stem.2", "block.2", "block.5", "hardtanh"},
        "branching": {"relu", "relu6", "relu_1", "relu_2"},
        "gated": {"relu", "relu_1", "relu_2"},
        "splitting": {"act", "act_1", "act_2"},
    }[name]


@pytest.mark.parametrize("name", ALL)
def test_every_pixel_has_a_code_of_its_own(name: str) -> None:
    graph = graph_of(name, 2)
    quantizer = graph.get_submodule("input_quant")
    every = (torch.arange(256).float() / 255).reshape(1, 1, 16, 16)
    with torch.no_grad():
        if name != "normalising":
            codes = quantizer(every) * 255
            # One float32 product by 1/255 away from the whole number.
            torch.testing.assert_close(codes.flatten(), torch.arange(256).float(), atol=2**-15, rtol=0)
            return
        # Behind a normalisation: signed, learned, 8 bit.
        low, high = quantizer(torch.tensor([[-99.0, 99.0]])).flatten().tolist()
        scale = quantizer.act_quant.scale().item()
    assert round(low / scale) == -128 and round(high / scale) == 127


def test_normalisation_stays_in_front_in_float() -> None:
    graph = graph_of("normalising", 4)
    net = float_net("normalising")
    seen: list[torch.Tensor] = []
    graph.get_submodule("input_quant").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        graph(X)
        assert torch.equal(seen[0], (X - net.mean) / net.std)  # type: ignore[operator]


def test_a_normalisation_asked_for_stands_in_front_of_everything() -> None:
    widths, normalisation = Widths(4, 4), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    graph = quantized_graph(
        float_net("branching"),
        name="net",
        widths=widths,
        classes=CLASSES,
        channels=3,
        image_size=SIDE,
        normalisation=normalisation,
    )
    assert set(float_net("branching").state_dict()) == {
        key for key in graph.state_dict() if not key.endswith("log_threshold")
    }
    seen: list[torch.Tensor] = []
    graph.get_submodule("input_quant").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        graph(X)
    mean, std = (torch.tensor(row).reshape(3, 1, 1) for row in normalisation)
    assert torch.equal(seen[0], (X - mean) / std)


@pytest.mark.parametrize("name", ALL)
def test_eight_bits_are_near_the_float_network(name: str) -> None:
    """256 levels a value and a few dozen roundings: some percent of the range of the logits, never tens of them."""
    with torch.no_grad():
        expected, found = float_net(name)(X), graph_of(name, 8)(X)
    assert (found - expected).abs().mean() < 0.03 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", ALL)
def test_no_forward_moves_a_quantizer(name: str) -> None:
    graph = graph_of(name, 4)
    before = {key: value.clone() for key, value in learned_state(graph).items()}
    graph.train()
    for _ in range(2):
        graph(X)
    assert all(torch.equal(value, before[key]) for key, value in learned_state(graph).items())


def learned_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a quantizer could keep: all but BatchNorm's running statistics."""
    return {key: value for key, value in model.state_dict().items() if "running" not in key and "tracked" not in key}


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    graph = graph_of(name, 4).train()
    graph(X).square().sum().backward()
    without = [key for key, parameter in graph.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_copy_is_the_same_network() -> None:
    graph = graph_of("gated", 4)
    twin = copy.deepcopy(graph)
    assert twin.meta["feature_layer"] == graph.meta["feature_layer"]
    with torch.no_grad():
        assert torch.equal(twin(X), graph(X))
    calibrate(twin, X.square())
    assert learned_thresholds(twin).keys() == learned_thresholds(graph).keys()
    assert any(
        float(value.log_threshold) != float(learned_thresholds(graph)[key].log_threshold)
        for key, value in learned_thresholds(twin).items()
    )


@pytest.mark.parametrize(("bits", "act_bits"), [(1, 1), (1, 4), (4, 1)])
def test_one_bit_is_refused(bits: int, act_bits: int) -> None:
    with pytest.raises(UsageError, match="1 bit needs blocks made for it"):
        graph_of("tutorial", bits, act_bits=act_bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 7}, "answers with 5 logits, the data have 7 classes"),
        ({"channels": 1}, "takes images of 3 channels, the data have 1"),
        ({"image_size": 4}, r"Conv2d 'conv2'.* does not take what reaches it"),
    ],
)
def test_data_that_do_not_fit(options: dict[str, int], message: str) -> None:
    fitting: dict[str, Any] = {"classes": CLASSES, "channels": 3, "image_size": SIDE}
    with pytest.raises(UsageError, match=message):
        quantized_graph(float_net("tutorial"), name="net", widths=Widths(4, 4), **{**fitting, **options})
