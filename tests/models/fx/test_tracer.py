"""Tracing with sizes that are numbers: branches on them are followed, and the number of images stays free."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.fx.build import quantized_graph
from robustq.models.quant.quantizers import Widths


class Windows(nn.Module):
    """Pads to whole windows, masks pixels by a tensor filled part by part, and mixes windows into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.shape[-1] % 4:
            x = functional.pad(x, (0, 4 - x.shape[-1] % 4, 0, 4 - x.size(2) % 4))
        images, channels, height, width = x.shape
        mask = x.new_zeros((height, width))
        for row in range(0, height, 4):
            mask[row : row + 2] = 1.0
        x = functional.relu(x) * mask
        x = x.view(images, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
        x = functional.relu(self.inner(x.reshape(-1, channels, 4, 4)))
        x = x.reshape(images, (height // 4) * (width // 4), channels, 16).mean((1, 3))
        logits: Tensor = self.fc(x)
        return logits


def test_branches_on_sizes() -> None:
    torch.manual_seed(0)
    network = Windows().eval()
    options = {"name": "net", "classes": 4, "channels": 3, "image_size": 10}
    graph = quantized_graph(network, widths=Widths(32, 32), **options)  # type: ignore[arg-type]
    x = torch.rand(5, 3, 10, 10)  # not the number of images of the trace
    with torch.no_grad():
        assert torch.equal(graph(x), network(x))
    reshaped = [node.args[1] for node in graph.graph.nodes if node.target is torch.reshape]
    assert reshaped == [(-1, 6, 3, 4, 3, 4), (-1, 6, 4, 4), (-1, 9, 6, 16)]
    quantized = quantized_graph(network, widths=Widths(4, 4), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        assert quantized(x).shape == (5, 4)


class Caching(nn.Module):
    """Keeps what it computed from a parameter, as the attention of EfficientFormer does in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.table = nn.Parameter(torch.rand(4))
        self.fc = nn.Linear(6, 4)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.table[torch.tensor([0, 1, 1, 2, 3, 0])]
        x = self.conv(x) + self.kept["bias"].view(1, 6, 1, 1)
        logits: Tensor = self.fc(functional.relu(x).mean((2, 3)))
        return logits


def test_tracing_leaves_nothing_in_the_network() -> None:
    network = Caching().eval()
    graph = quantized_graph(network, name="net", widths=Widths(32, 32), classes=4, channels=3, image_size=10)
    assert isinstance(network(torch.rand(2, 3, 10, 10)), Tensor)
    graph.load_state_dict({name: value + 1 for name, value in graph.state_dict().items()})
    network.load_state_dict(graph.state_dict())
    network.kept.clear()
    x = torch.rand(2, 3, 10, 10)
    with torch.no_grad():
        assert torch.equal(graph(x), network(x))
