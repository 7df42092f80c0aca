"""Residual networks for small images: ResNet-20 and ResNet-8 of He et al. (arXiv:1512.03385, section 4.2).

Module names are torchvision's (``layer1.0.conv1``, ``downsample.0``, ``fc``). Shortcuts that change the shape are 1x1
projections with BatchNorm (option B), since deployed files cannot pad channels as integers: ResNet-20 then has 21
convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustq.models.layers import Layers, plain


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; every convolution branch is quantized to 8 bits before the sum."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, out_channels, kernel_size=3, stride=stride)
        self.bn1 = layers.batch_norm(out_channels)
        self.relu1 = layers.relu()
        self.conv2 = layers.conv(out_channels, out_channels, kernel_size=3)
        self.bn2 = layers.batch_norm(out_channels)
        self.branch = layers.branch()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                layers.conv(in_channels, out_channels, kernel_size=1, stride=stride),
                layers.batch_norm(out_channels),
                layers.branch(),
            )
        self.relu2 = layers.relu()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        shortcut = plain(x) if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.branch(self.bn2(self.conv2(out)))
        summed: Tensor = self.relu2(out + shortcut)
        return summed


class ResNet(nn.Module):
    """ResNet of three stages (16, 32, 64 channels) with ``blocks`` basic blocks each.

    Input: (N, channels, H, W) float32 in [0, 1]; output: (N, classes) logits. The tensor that enters ``avgpool`` is the
    feature that ODG-Q aligns.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, layers: Layers, *, blocks: int, channels: int, classes: int) -> None:
        super().__init__()
        self.pixels = layers.pixels()
        self.conv1 = layers.conv(channels, 16, kernel_size=3, first=True)
        self.bn1 = layers.batch_norm(16)
        self.relu = layers.relu()
        width = 16
        for stage, out_width in enumerate((16, 32, 64), start=1):
            stage_blocks = []
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 1 else 1
                stage_blocks.append(BasicBlock(layers, width, out_width, stride=stride))
                width = out_width
            self.add_module(f"layer{stage}", nn.Sequential(*stage_blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.pooled = layers.pooled()
        self.fc = layers.linear(width, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) in [0, 1] -> (N, classes) logits."""
        x = self.relu(self.bn1(self.conv1(self.pixels(x))))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        # Quantized before it is flattened: onnxruntime pools as integers only where the quantizer follows at once.
        logits: Tensor = self.fc(torch.flatten(self.pooled(self.avgpool(plain(x))), 1))
        return logits


def _initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions (fan-out, as torchvision's ResNets)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
