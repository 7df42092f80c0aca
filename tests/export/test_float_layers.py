"""Files of networks with layers that stay in float: the same answers in every format, integer layers around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import to_float
from robustq.export.formats import build
from robustq.export.recheck import prove
from robustq.export.session import OnnxModel
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import Widths
from robustq.models.spec import ModelSpec
from robustq.models.state_dict import float_layers_of
from robustq.twin.graph import graph_of
from robustq.twin.network import Twin
from tests.models.fx.custom_nets import CLASSES, SIDE, pixels

IMAGES = pixels(40, seed=3)


class Norms(nn.Module):
    """Norms, activation functions and a transposed convolution without an integer form; a softmax inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8)
        self.conv, self.instance = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.layer, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.tracked = nn.InstanceNorm2d(8, track_running_stats=True)
        self.last, self.fc = nn.Conv2d(8, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.group(self.stem(x)))
        x = functional.mish(self.instance(self.conv(x)))
        x = self.up(x)
        x = functional.gelu(self.mix(self.layer(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        x = functional.silu(self.tracked(self.last(x))).softmax(1)
        logits: Tensor = self.fc(x.sum((2, 3)))
        return logits


class Tokens(nn.Module):
    """A transformer block in two spellings of attention, with a class token and a place embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        parts = self.mix(self.norm(x)).reshape(x.shape[0], 10, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape[0], 10, 8))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(x[:, 0])
        return logits


class Moving(nn.Module):
    """Operations that move, choose or repeat values: all layers are integer."""

    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", (row[:, None] * row).expand(8, 1, 3, 3).clone())
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(10, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(functional.pad(x, (-1, 0, 0, -1)))  # 11 x 11
        x = functional.relu6(x) + functional.relu(x)
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), self.blur, stride=2, groups=x.shape[1])
        x = self.a(functional.interpolate(x, scale_factor=1.7))
        x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 1)
        x = torch.stack([self.b(x), torch.roll(x, 1, 3), x]).sum(0)
        x = torch.cat([functional.interpolate(functional.pixel_shuffle(x, 2), x.shape[2:]), x], 1)
        logits: Tensor = self.fc(torch.max(self.c(x).flatten(2), 2)[0])
        return logits


class Places(nn.Module):
    """An encoding of positions by a layer, softmax of a part of the channels, and a convolution for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encode = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(2, 8, 1)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))  # 3 x 3
        ones = torch.ones((x.shape[0], 3, 3), device=x.device)
        x = x + self.encode(torch.stack([ones.cumsum(1), ones.cumsum(2)], 1).sin())
        first, second = self.conv(x).chunk(2, 1)
        logits: Tensor = self.head(torch.cat([first.softmax(1), second], 1)).flatten(1)
        return logits


NETS: dict[str, Callable[[], nn.Module]] = {"norms": Norms, "tokens": Tokens, "moving": Moving, "places": Places}

IN_FLOAT = {
    "norms": ("group", "instance", "mish", "up", "layer", "gelu", "silu", "softmax", "sum_1"),
    "tokens": ("add_3", "add", "norm", "scaled_dot_product_attention", "attention"),
    "moving": (),
    "places": ("add", "softmax"),
}
"""The layers that are said to stay in float."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d) and module.track_running_stats:
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return net


def graph_at(name: str, bits: int) -> GraphModule:
    options: dict[str, Any] = {"classes": CLASSES, "channels": 3, "image_size": SIDE}
    graph = quantized_graph(made(name), name=name, widths=Widths(bits, bits), **options)
    calibrate(graph, to_float(IMAGES))
    return graph


def spec(bits: int) -> ModelSpec:
    return ModelSpec("own:net", bits, bits, CLASSES, 3, SIDE, "data", None, tuple("abcde"))


@functools.cache
def folded(name: str, bits: int) -> nn.Module:
    return fold(graph_at(name, bits), spec(bits))


@pytest.mark.parametrize("name", NETS)
def test_at_32_bits_the_network_is_the_users(name: str) -> None:
    net, graph, x = made(name), graph_at(name, 32), to_float(IMAGES)
    with torch.no_grad():
        assert torch.equal(graph(x), net(x))
    assert set(graph.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize(
    ("name", "bits", "format_name"),
    [
        *((name, 4, format_name) for name in NETS for format_name in ("integer", "qcdq")),
        *(pytest.param(name, 4, "qonnx", marks=pytest.mark.slow) for name in NETS),
        *((name, 8, "packed") for name in NETS),
    ],
)
def test_files_give_the_references_answers(tmp_path: Path, name: str, bits: int, format_name: str) -> None:
    path, network = tmp_path / "net.onnx", folded(name, bits)
    onnx.save(build(format_name, network, spec(bits)), path)
    proof = prove(path, format_name, network, spec(bits), IMAGES[:20] if format_name == "qonnx" else IMAGES)
    assert proof.shortfalls == []
    twin = Twin(graph_of(onnx.load(path)))
    x = to_float(IMAGES[:20]).requires_grad_()
    twin(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    if format_name in ("integer", "packed"):
        layers = [one for one in network.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
        inside_attention = 1 if name == "tokens" else 0  # its projection
        assert len(proof.layers.integer) >= len(layers) - inside_attention
        assert (proof.layers.in_float == ()) == (name == "moving")
        with torch.no_grad():
            answers = OnnxModel(path)(x)
            # Products and norms in another order; values between two codes get either.
            torch.testing.assert_close(twin(x), answers, atol=0.02 * float(answers.abs().max()), rtol=0)


@pytest.mark.parametrize("name", NETS)
def test_layers_in_float_are_named(name: str) -> None:
    assert float_layers_of(graph_at(name, 4)) == IN_FLOAT[name]


def test_a_buffer_in_a_convolution_is_loaded_and_saved_under_its_name() -> None:
    state = made("moving").state_dict()
    state["blur"] = state["blur"].roll(1, 2)
    graph = graph_at("moving", 4)
    assert set(state) < set(graph.state_dict())
    assert not graph.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(graph.state_dict()["blur"], state["blur"])
    blur: Any = graph.get_submodule("blur")
    step = blur.quant_weight().scale
    torch.testing.assert_close(blur.quant_weight().value, state["blur"], atol=step.max().item() / 2, rtol=0)
    assert "blur.weight" not in dict(graph.named_parameters())
