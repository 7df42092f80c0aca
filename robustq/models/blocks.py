"""Residual blocks and shortcuts: what a ResNet is made of, at every width.

Names are torchvision's (``conv1``, ``bn1``, ``downsample.0``), so that float weights load at every width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.layers import Layers, plain

Shortcut = Literal["projection", "padding"]
"""Shortcuts that change the shape: option B or option A of He et al. (arXiv:1512.03385, section 3.3)."""

SIGN_NORMS = ("norm1", "norm2")
"""Layers of a binary block that no other has."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; every convolution branch is quantized to 8 bits before the sum.

    With ``layers.shared_sum_scale`` the shortcut passes through the quantizer of the convolution branch too, an
    identity shortcut included.
    """

    def __init__(
        self, layers: Layers, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut = "projection"
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, out_channels, kernel_size=3, stride=stride)
        self.bn1 = layers.batch_norm(out_channels)
        self.relu1 = layers.relu()
        self.conv2 = layers.conv(out_channels, out_channels, kernel_size=3)
        self.bn2 = layers.batch_norm(out_channels)
        self.branch = layers.branch()
        self.downsample = _downsample(layers, in_channels, out_channels, stride=stride, kind=shortcut)
        self.relu2 = layers.relu()
        self.shared_sum_scale = layers.shared_sum_scale

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.branch(self.bn2(self.conv2(out)))
        if self.shared_sum_scale:
            shortcut = self.branch(plain(shortcut))
        summed: Tensor = self.relu2(plain(out) + plain(shortcut))
        return summed


class BinaryBlock(nn.Module):
    """The same block with signs for activations: BatchNorm - sign - convolution, twice (XNOR-Net, arXiv:1603.05279).

    Each convolution has a shortcut of its own (Bi-Real Net, arXiv:1808.00278): a sign keeps one bit of a value, the
    8-bit residual stream beside it keeps the rest. As there, no ReLU cuts the stream's negative half off, and
    projection shortcuts are not binary: they are 8 bit. Unlike there, a ReLU stands behind each convolution's
    BatchNorm, before the sum: without it nothing but signs bends what the network computes (docs/results/widths.md).
    ``norm1`` and ``norm2`` are not in the float network; calibration sets their statistics.
    """

    def __init__(
        self, layers: Layers, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut = "projection"
    ) -> None:
        super().__init__()
        self.norm1 = layers.sign_norm(in_channels)
        self.sign1 = layers.sign()
        self.conv1 = layers.conv(in_channels, out_channels, kernel_size=3, stride=stride)
        self.bn1 = layers.batch_norm(out_channels)
        self.relu1 = layers.relu()
        self.downsample = _downsample(layers, in_channels, out_channels, stride=stride, kind=shortcut)
        self.sum1 = layers.branch()
        self.norm2 = layers.sign_norm(out_channels)
        self.sign2 = layers.sign()
        self.conv2 = layers.conv(out_channels, out_channels, kernel_size=3)
        self.bn2 = layers.batch_norm(out_channels)
        self.relu2 = layers.relu()
        self.sum2 = layers.branch()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.sum1(plain(self.relu1(self.bn1(self.conv1(self.sign1(self.norm1(x)))))) + plain(shortcut))
        out = self.relu2(self.bn2(self.conv2(self.sign2(self.norm2(x)))))
        summed: Tensor = self.sum2(plain(out) + plain(x))
        return summed


class PaddedShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, with as many zero channels before as behind. It has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.channels = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        return functional.pad(plain(x)[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channels))


def _downsample(
    layers: Layers, in_channels: int, out_channels: int, *, stride: int, kind: Shortcut
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "padding":
        parts = [_padding(layers, in_channels, out_channels, stride=stride)]
    else:
        conv = layers.conv(in_channels, out_channels, kernel_size=1, stride=stride, outer=layers.widths.is_binary)
        parts = [conv, layers.batch_norm(out_channels)]
    return nn.Sequential(*parts) if layers.shared_sum_scale else nn.Sequential(*parts, layers.branch())


def _padding(layers: Layers, in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    """The padded shortcut; in a folded quantized network as a 1x1 convolution of zeros and ones.

    Its values are the same, exactly; integer kernels can slice no pixels and pad no channels, but they can convolve.
    """
    shortcut = PaddedShortcut(in_channels, out_channels, stride=stride)
    if not layers.folded or layers.widths.is_float:
        return shortcut
    conv: Any = layers.conv(in_channels, out_channels, kernel_size=1, stride=stride, outer=True)
    with torch.no_grad():
        conv.weight.zero_()
        for channel in range(in_channels):
            conv.weight[shortcut.channels[0] + channel, channel] = 1.0
        conv.bias.zero_()
    made: nn.Module = conv
    return made
