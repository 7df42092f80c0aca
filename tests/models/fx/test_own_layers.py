"""Layers that are computed by functions on a module's own tensors: answers, names and modes of the user's network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.fx.fold import fold_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import Widths

X = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class FusedNorm(nn.Module):
    """Names of its own, no counter of batches, and an activation function inside."""

    mu: Tensor
    var: Tensor

    def __init__(self, channels: int, *, frozen: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("mu", torch.rand(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)
        self.act = nn.ReLU()
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        training = self.training and not self.frozen
        x = functional.batch_norm(x, self.mu, self.var, self.gamma, training=training, momentum=0.3, eps=1e-3)
        activated: Tensor = self.act(x)
        return activated


class PaddedConv(nn.Conv2d):
    """Pads first, as convolutions do that were trained in TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        torch._assert(x.shape[1] == self.in_channels, "channels")
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, bias=self.bias)


class Net(nn.Module):
    def __init__(self, norm: Any, **options: Any) -> None:
        super().__init__()
        self.conv = PaddedConv(3, 8, 3, stride=2, padding=7)
        self.norm = norm(8, **options)
        self.fc = OwnLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.conv(x)).mean((2, 3)))
        return logits


def graph_of(network: nn.Module, bits: int) -> Any:
    return quantized_graph(network, name="net", widths=Widths(bits, bits), classes=4, channels=3, image_size=9)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_fused_norm_is_the_users_in_both_modes(frozen: bool) -> None:
    torch.manual_seed(0)
    network = Net(FusedNorm, frozen=frozen).eval()
    expected = copy.deepcopy(network)
    graph = graph_of(network, 32)
    assert graph.state_dict().keys() == expected.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(graph(X), expected(X))
        assert torch.equal(graph.train()(X), expected.train()(X))
    for name, value in expected.state_dict().items():
        assert torch.equal(graph.state_dict()[name], value), name
    stored = {name: value + 1 for name, value in expected.state_dict().items()}
    graph.load_state_dict(stored)
    assert all(torch.equal(graph.state_dict()[name], value) for name, value in stored.items())


def test_it_is_folded_into_its_convolution() -> None:
    torch.manual_seed(0)
    graph = graph_of(Net(FusedNorm, frozen=False), 4)
    calibrate(graph, X)
    folded = fold_graph(graph)
    called = [type(folded.get_submodule(str(node.target))) for node in folded.graph.nodes if node.op == "call_module"]
    assert [kind.__name__ for kind in called] == [
        *("QuantIdentity", "ExactConv2d", "QuantReLU", "AdaptiveAvgPool2d", "QuantIdentity", "ExactLinear")
    ]
    with torch.no_grad():
        torch.testing.assert_close(folded(X), graph(X), atol=2e-3, rtol=0)  # biases are rounded


class BatchStatistics(FusedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, self.gamma, training=True)


class Twice(FusedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Mixed(FusedNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, frozen=False)
        self.other = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.mu, self.other.running_var)


@pytest.mark.parametrize(
    ("norm", "options", "text"),
    [
        (BatchStatistics, {"frozen": False}, "uses statistics of the batch in eval mode"),
        (Twice, {"frozen": False}, "is the second call of 'norm'"),
        (Mixed, {}, "computes on tensors of no single module"),
    ],
)
def test_refused(norm: type[nn.Module], options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        graph_of(Net(norm, **options), 4)
