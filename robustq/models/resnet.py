"""Residual networks (He et al., arXiv:1512.03385) and their blocks, at every width.

ResNet-8 and ResNet-20 take small images, ResNet-18 large ones. Module names are torchvision's (``layer1.0.conv1``,
``downsample.0``, ``fc``), so that its ResNet-18 weights load. Shortcuts that change the shape are 1x1 projections with
BatchNorm (option B), which gives ResNet-20 21 convolutions, or parameter-free (option A, section 3.3).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.layers import Layers, plain

Shortcut = Literal["projection", "padding"]
"""Shortcuts that change the shape: option B or option A."""

SIGN_NORMS = ("norm1", "norm2")
"""Layers that only binary blocks have."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; every convolution branch is quantized to 8 bits before the sum.

    With ``layers.shared_sum_scale`` the quantizer of the convolution branch quantizes the shortcut too.
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
    """A block of binary activations: BatchNorm - sign - convolution, twice (XNOR-Net, arXiv:1603.05279).

    As in Bi-Real Net (arXiv:1808.00278) each convolution has a shortcut of its own, an 8-bit residual stream that no
    ReLU clips, and projection shortcuts are not binary but 8 bit. Unlike there, a ReLU follows each convolution's
    BatchNorm, before the sum: otherwise signs are the only non-linearity (docs/results/widths.md).
    ``norm1`` and ``norm2`` do not exist in the float network; calibration sets their statistics.
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
    """Option A: every ``stride``-th pixel, and as many zero channels before as behind. It has no parameters."""

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
    return nn.Sequential(*parts, *([] if layers.shared_sum_scale else [layers.branch()]))


def _padding(layers: Layers, in_channels: int, out_channels: int, *, stride: int) -> Any:
    """The padded shortcut; in a folded quantized network an equal 1x1 convolution, which integer kernels can run."""
    shortcut = PaddedShortcut(in_channels, out_channels, stride=stride)
    if not layers.folded or layers.widths.is_float:
        return shortcut
    conv: Any = layers.conv(in_channels, out_channels, kernel_size=1, stride=stride, outer=True)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[shortcut.channels[0] :, :, 0, 0].fill_diagonal_(1.0)
        conv.bias.zero_()
    return conv


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling (its input: the feature that ODG-Q aligns), linear layer.

    Args:
        layers: makes the layers; binary activations give binary blocks.
        blocks, widths: blocks and channels of each stage; every stage but the first halves the image.
        large_images: a 7x7 stem of stride 2 and max pooling (ImageNet) instead of a 3x3 one.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        channels: int,
        classes: int,
        large_images: bool = False,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        block_type = BinaryBlock if layers.widths.is_binary else BasicBlock
        width = widths[0]
        kernel_size, stride = (7, 2) if large_images else (3, 1)
        self.pixels = layers.pixels()
        self.conv1 = layers.conv(channels, width, kernel_size=kernel_size, stride=stride, outer=True)
        self.bn1 = layers.batch_norm(width)
        self.relu = layers.branch() if layers.widths.is_binary else layers.relu()  # signs need negative values too
        # After the quantizer, where onnxruntime pools integer codes.
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if large_images else nn.Identity()
        self._stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for name, count, out_width in zip(self._stages, blocks, widths, strict=True):
            made = []
            for block in range(count):
                stride = 2 if block == 0 and name != "layer1" else 1
                made.append(block_type(layers, width, out_width, stride=stride, shortcut=shortcut))
                width = out_width
            self.add_module(name, nn.Sequential(*made))
        self.last = layers.relu() if layers.widths.is_binary else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.pooled = layers.pooled()
        self.fc = layers.linear(width, classes)
        if not layers.folded:  # folding sets all weights but those of padded shortcuts, which must stay
            for module in self.modules():  # He initialisation, as of torchvision's ResNets
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) in [0, 1] -> (N, classes) logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.pixels(x)))))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        # Quantized before it is flattened: onnxruntime pools as integers only where the quantizer follows at once.
        logits: Tensor = self.fc(torch.flatten(self.pooled(self.avgpool(plain(self.last(x)))), 1))
        return logits
