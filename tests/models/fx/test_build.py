"""From a float model to a quantized graph, over models as users write them."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.quantizers import Widths, learned_thresholds
from robustq.models.state_dict import feature_layer_of
from tests.models.fx.custom_nets import CLASSES, NETS, SIDE, float_net, graph_of, pixels

ALL = sorted(NETS)
X = pixels().float() / 255

OUTER_LAYERS = {
    "tutorial": {"conv1", "fc3"},
    "normalising": {"stem", "fc"},
    "inverted": {"stem.0", "classifier.1"},
    "branching": {"left", "right", "fc"},
    "gated": {"conv1.0", "last"},
    "splitting": {"stem", "head"},
}
INNER_RELUS = {  # whose values an inner layer takes
    "tutorial": {"relu", "relu_1", "relu_2"},
    "normalising": {"relu", "relu_2"},
    "inverted": {"stem.2", "block.2", "block.5", "hardtanh"},
    "branching": {"relu", "relu6", "relu_1", "relu_2"},
    "gated": {"relu", "relu_1", "relu_2"},
    "splitting": {"act", "act_1", "act_2"},
}
FEATURE_LAYERS = {
    "tutorial": "max_pool2d_1",  # no global pooling: the last pooling of all
    "normalising": "pool",
    "inverted": "mean",
    "branching": "pool",  # windows of two, but the last one
    "gated": "adaptive_avg_pool2d",  # not the squeezing one, which comes first
    "splitting": "max_pool2d",
}


def build(name: str, **options: Any) -> GraphModule:
    defaults: dict[str, Any] = {"widths": Widths(4, 4), "classes": CLASSES, "channels": 3, "image_size": SIDE}
    return quantized_graph(float_net(name), name="net", **{**defaults, **options})


def activations(model: nn.Module) -> dict[str, Tensor]:
    """Quantizer name -> its values for X."""
    caught: dict[str, Tensor] = {}
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


def entering(model: GraphModule, layer: str) -> Tensor:
    """The tensor that enters ``layer`` for X."""
    caught: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(X)
    handle.remove()
    (found,) = caught
    return found


@pytest.mark.parametrize("name", ALL)
def test_float_is_the_users_model_bit_for_bit(name: str) -> None:
    net, graph = float_net(name), graph_of(name, 32)
    with torch.no_grad():
        assert torch.equal(graph(X), net(X))
    assert set(graph.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize("name", ["normalising", "branching"])
def test_float_trains_bit_for_bit_as_the_users_model(name: str) -> None:
    """The two models without dropout: batch statistics, running statistics and gradients."""
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
def test_levels_and_features(name: str) -> None:
    bits, act_bits = 3, 2
    graph = graph_of(name, bits, act_bits=act_bits)
    added = {f"{key}.log_threshold" for key in learned_thresholds(graph)}
    assert set(graph.state_dict()) == set(float_net(name).state_dict()) | added
    for key, module in graph.named_modules():
        if isinstance(module, qnn.QuantConv2d | qnn.QuantLinear):
            own = 8 if key in OUTER_LAYERS[name] else bits
            codes = module.quant_weight().int()
            assert codes.abs().max() == 2 ** (own - 1) - 1, f"{key}: the largest weight of a channel is its last code"
    for key, values in activations(graph).items():
        module = graph.get_submodule(key)
        codes = values / module.act_quant.scale().item()
        # Codes are integers up to the rounding of one float32 product and one quotient.
        torch.testing.assert_close(codes, codes.round(), atol=codes.abs().max().item() * 2**-22, rtol=0)
        if isinstance(module, qnn.QuantReLU):
            width = act_bits if key in INNER_RELUS[name] else 8
            assert codes.min() >= 0 and codes.max().round() <= 2**width - 1
            assert width == 8 or codes.max().round() > 2 ** (width - 1) - 1, f"{key} is narrower than {width} bits"
    assert feature_layer_of(graph) == FEATURE_LAYERS[name]
    assert entering(graph, FEATURE_LAYERS[name]).dim() == 4


@pytest.mark.parametrize("name", ["normalising", "inverted"])
def test_every_pixel_has_a_code_of_its_own(name: str) -> None:
    quantizer = graph_of(name, 2).get_submodule("input_quant")
    with torch.no_grad():
        if name == "inverted":
            codes = quantizer((torch.arange(256).float() / 255).reshape(1, 1, 16, 16)) * 255
            # One float32 product by 1/255 away from the integer.
            torch.testing.assert_close(codes.flatten(), torch.arange(256).float(), atol=2**-15, rtol=0)
            return
        # Behind a normalisation: signed, learned, 8 bit.
        low, high = quantizer(torch.tensor([[-99.0, 99.0]])).flatten().tolist()
        scale = quantizer.act_quant.scale().item()
    assert round(low / scale) == -128 and round(high / scale) == 127


def test_normalisation_stays_in_front_in_float() -> None:
    net = float_net("normalising")
    assert torch.equal(entering(graph_of("normalising", 4), "input_quant"), (X - net.mean) / net.std)  # type: ignore[operator]
    normalisation = ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    graph = build("branching", normalisation=normalisation)
    weights = {key for key in graph.state_dict() if not key.endswith("log_threshold")}
    assert weights == set(float_net("branching").state_dict())
    mean, std = (torch.tensor(row).reshape(3, 1, 1) for row in normalisation)
    assert torch.equal(entering(graph, "input_quant"), (X - mean) / std)


@pytest.mark.parametrize("name", ALL)
def test_eight_bits_are_near_the_float_model(name: str) -> None:
    """256 levels a value and a few dozen roundings: some percent of the range of the logits, never tens of them."""
    with torch.no_grad():
        expected, found = float_net(name)(X), graph_of(name, 8)(X)
    assert (found - expected).abs().mean() < 0.03 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", ALL)
def test_a_training_pass_gives_every_parameter_a_gradient_and_moves_no_quantizer(name: str) -> None:
    graph = graph_of(name, 4).train()
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    graph(X).square().sum().backward()
    assert [key for key, parameter in graph.named_parameters() if parameter.grad is None] == []
    moved = {key for key, value in graph.state_dict().items() if not torch.equal(value, before[key])}
    assert not {key for key in moved if "running" not in key and "tracked" not in key}


@pytest.mark.parametrize(("wanted", "found"), [("head", "head"), ("block", "block.0"), ("block.3", "block.3")])
def test_a_feature_layer_can_be_named(wanted: str, found: str) -> None:
    assert feature_layer_of(build("inverted", feature_layer=wanted)) == found


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inverted", {"feature_layer": "heads"}, "--feature-layer heads: net has no such layer; nearest: head"),
        ("inverted", {"feature_layer": "classifier"}, r"a tensor of shape \(2, 16\) enters it"),
        ("tutorial", {"widths": Widths(1, 4)}, "1 bit needs blocks made for it"),
        ("tutorial", {"widths": Widths(4, 1)}, "1 bit needs blocks made for it"),
        ("tutorial", {"classes": 7}, "answers with 5 logits, the data have 7 classes"),
        ("tutorial", {"channels": 1}, "takes images of 3 channels, the data have 1"),
        ("tutorial", {"image_size": 4}, r"Conv2d 'conv2'.* does not take what reaches it"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **options)


def test_optional_arguments_of_forward_take_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor, return_features: bool = False, scale: float = 2.0, mask: Any = None) -> Any:
            features = torch.relu(self.conv(x)).mean((2, 3)) * scale
            if mask is not None:
                features = features * mask
            return (self.fc(features), features) if return_features else self.fc(features)

    network = Optional().eval()
    graph = quantized_graph(
        network, name="net", widths=Widths(32, 32), classes=CLASSES, channels=3, image_size=SIDE
    ).eval()
    with torch.no_grad():
        assert torch.equal(graph(X), network(X))
