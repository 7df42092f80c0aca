"""Random custom networks: groups, gates, concatenations, moves, layers in float, odd sides, and extreme BatchNorm."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn

from robustq.errors import ExportError
from robustq.export.formats import build
from robustq.export.recheck import prove
from robustq.models.fx.build import quantized_graph
from robustq.models.mixed_widths import set_layer_bits
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import Widths, learned_thresholds
from robustq.models.spec import ModelSpec
from tests.export.random_parts import in_float, moves

Make = Callable[[], nn.Module]
ACTIVATIONS: tuple[Make, ...] = (nn.ReLU, nn.ReLU, nn.ReLU6, lambda: nn.Hardtanh(0.0, 3.0), nn.Identity, nn.Hardswish)
GAMMAS = (-0.8, 0.0, 1e-20, -1e-9, 1e-3, 100.0, -1e4, 1e4, 1e6, -1e6)


@dataclass
class Draw:
    """Random numbers of one network, and the feature map as far as it is built."""

    rng: random.Random
    channels: int
    side: int

    def layer(
        self, *, out: int | None = None, same_size: bool = False, act: bool = True, norm: bool = True
    ) -> nn.Sequential:
        """A convolution with or without bias and BatchNorm, and an activation."""
        rng = self.rng
        out = rng.choice((1, 4, 6, 8, 12)) if out is None else out
        groups = rng.choice([g for g in (1, 1, 2, 4, self.channels) if self.channels % g == 0 and out % g == 0])
        kernel = rng.choice([k for k in ((1, 2, 3, 5) if same_size else (1, 3, 5)) if k <= self.side])
        options: dict[str, Any] = {"groups": groups, "bias": rng.random() < 0.5}
        if same_size:
            conv = nn.Conv2d(self.channels, out, kernel, padding="same", dilation=rng.choice((1, 2)), **options)
        else:
            padding = kernel // 2 if self.side < 2 * kernel else rng.choice((0, kernel // 2))
            conv = nn.Conv2d(self.channels, out, kernel, rng.choice((1, 1, 2)), padding, **options)
        parts: list[nn.Module] = [conv]
        if rng.random() < 0.8 and norm:
            parts.append(nn.BatchNorm2d(out))
        if act:
            parts.append(rng.choice(ACTIVATIONS)())
        self.side = conv(torch.zeros(1, self.channels, self.side, self.side)).shape[-1]
        self.channels = out
        return nn.Sequential(*parts)


class Sum(nn.Module):
    """x + branch(x), or with a projection beside it."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        channels = draw.channels
        self.branch = nn.Sequential(draw.layer(same_size=True), draw.layer(out=channels, same_size=True, act=False))
        self.shortcut = (
            draw.layer(out=channels, same_size=True, act=False) if draw.rng.random() < 0.3 else nn.Identity()
        )
        self.act = draw.rng.choice(ACTIVATIONS)()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))  # type: ignore[no-any-return]


class Concatenation(nn.Module):
    """Two layers beside one another."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        channels = draw.channels
        self.left = draw.layer(same_size=True)
        out, draw.channels = draw.channels, channels
        self.right = draw.layer(same_size=True)
        draw.channels += out

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Gate(nn.Module):
    """x times a gate of every pixel, or, squeezed, of every channel."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        channels, side = draw.channels, draw.side
        self.squeeze = draw.rng.random() < 0.5
        if self.squeeze:
            hidden = draw.rng.choice((2, 4))
            convs = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
            self.inner: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), convs[0], nn.ReLU(), convs[1])
        else:
            self.inner = draw.layer(out=channels, same_size=True, act=False)
        draw.channels, draw.side = channels, side
        self.gate = draw.rng.choice((nn.Sigmoid, nn.Hardsigmoid))()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.inner(x))  # type: ignore[no-any-return]


def pooling(draw: Draw) -> nn.Module:
    """Max or average pooling, as far as the feature map has room for it."""
    if draw.side < 4:
        return nn.Identity()
    pool = draw.rng.choice(
        (
            nn.MaxPool2d(2),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d(2),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.AvgPool2d(3, 2, draw.rng.choice((0, 1)), ceil_mode=True),
        )
    )
    draw.side = pool(torch.zeros(1, 1, draw.side, draw.side)).shape[-1]
    return pool


def _grown(draw: Draw, part: nn.Module) -> nn.Module:
    """``part`` and a layer behind it; a part that leaves less than two rows or columns, or no square, is left out."""
    with torch.no_grad():
        shape = part.eval()(torch.zeros(1, draw.channels, draw.side, draw.side)).shape
    if min(shape[2:]) < 2 or shape[2] != shape[3]:
        return draw.layer(same_size=True)
    draw.channels, draw.side = shape[1], shape[2]
    return nn.Sequential(part, draw.layer())


def float_layer(draw: Draw) -> nn.Module:
    """A layer, one in float behind it, and a layer.

    No extreme BatchNorm stands in front: it makes constant channels, whose variance is rounding alone, and a norm makes
    that large.
    """
    return nn.Sequential(
        draw.layer(out=8, act=draw.rng.random() < 0.5, norm=False), _grown(draw, in_float(draw.rng, 8))
    )


def moving(draw: Draw) -> nn.Module:
    """A function that moves values, and a layer."""
    return _grown(draw, moves(draw.rng, draw.channels, draw.side)) if draw.side > 2 else nn.Identity()


class RandomNet(nn.Module):
    """Two to five parts and a classifier behind them."""

    def __init__(self, draw: Draw, classes: int) -> None:
        super().__init__()
        rng = draw.rng
        parts: list[nn.Module] = [draw.layer()]
        for _ in range(rng.randint(2, 5)):
            make = rng.choice((Draw.layer, Draw.layer, Sum, Concatenation, Gate, pooling, float_layer, moving, moving))
            parts.append(make(draw))
        self.parts = nn.Sequential(*parts)
        pooled = rng.random() < 0.6
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
        self.fc = nn.Linear(draw.channels * (1 if pooled else draw.side**2), classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.pool(self.parts(x)), 1))
        return logits


def random_network(seed: int) -> tuple[GraphModule, ModelSpec, Tensor]:
    """A network at a random width, calibrated, in eval mode; what it is; and 100 images for it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, side, classes = rng.choice((1, 3)), rng.choice((7, 9, 11, 12, 15)), rng.randint(2, 7)
    net = RandomNet(Draw(rng, channels, side), classes).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                _break(module, rng)
    bits = rng.choice(((8, 8), (8, 8), (4, 4), (3, 3), (2, 2), (4, 8), (8, 4), (2, 8)))
    inner = [name for name, one in net.named_modules() if isinstance(one, nn.Conv2d)][1:]
    own = {name: rng.choice((8, 4, 3, 2)) for name in inner if rng.random() < 0.2}
    spec = ModelSpec("own:net", *bits, classes, channels, side, "x", None, (), layer_bits=tuple(own.items()))
    shape: dict[str, Any] = {"classes": classes, "channels": channels, "image_size": side}
    graph = quantized_graph(net, name="net", widths=Widths(*bits), **shape)
    set_layer_bits(graph, own)
    graph.eval()
    x = random_images(100, channels, side)
    calibrate(graph, random_images(40, channels, side))
    with torch.no_grad():
        for threshold in learned_thresholds(graph).values():
            # Calibrated thresholds are simple fractions of one another, which makes ties.
            threshold.log_threshold.add_(0.02 * torch.randn(()))
    return graph, spec, x


def outcome(seed: int, format_name: str, folder: Path) -> str:
    """Result of one network: ``equal``, ``ties``, ``refused: ...``, or ``WRONG: ...``."""
    graph, spec, x = random_network(seed)
    path = folder / f"{seed}-{format_name}.onnx"
    try:
        folded = fold(graph, spec)
        onnx.save(build(format_name, folded, spec), path)
    except ExportError as error:
        return f"refused: {error}"
    proof = prove(path, format_name, folded, spec, (x * 255).round().to(torch.uint8))
    path.unlink()
    if proof.shortfalls:
        return f"WRONG: {'; '.join(proof.shortfalls)}"
    return "ties" if proof.on_ties else "equal"


def _break(norm: nn.BatchNorm2d, rng: random.Random) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0.0, 0.3)
    norm.running_mean.normal_(0.0, 0.3)
    norm.running_var.uniform_(0.2, 2.0)
    for channel in range(norm.num_features):
        if rng.random() < 0.15:
            norm.weight[channel] = rng.choice(GAMMAS)
        if rng.random() < 0.1:
            norm.running_var[channel] = 0.0
        if rng.random() < 0.05:
            norm.bias[channel] = rng.choice((-50.0, 1e3, -1e5))


def random_images(count: int, channels: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, channels, side, side)).float() / 255
