"""Residual networks of He et al. (arXiv:1512.03385): ResNet-8 and ResNet-20 for small images, ResNet-18 for large ones.

Module names are torchvision's (``layer1.0.conv1``, ``downsample.0``, ``fc``), so that its ResNet-18 weights load.
Shortcuts that change the shape are 1x1 projections with BatchNorm (option B): ResNet-20 then has 21 convolutions.
Checkpoints with the parameter-free shortcuts of section 4.2 (option A) have architectures of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustq.models.blocks import BasicBlock, BinaryBlock, Shortcut
from robustq.models.layers import Layers, plain


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling, one linear layer.

    Input: (N, channels, H, W) float32 in [0, 1]; output: (N, classes) logits. The tensor that enters ``avgpool`` is the
    feature that ODG-Q aligns.

    Args:
        layers: makes the layers; signs for activations ask for binary blocks.
        blocks: blocks of each stage; every stage but the first halves the image.
        widths: channels of each stage.
        channels, classes: shape of the task.
        large_images: a 7x7 stem of stride 2 and max pooling (ImageNet) instead of a 3x3 one.
        shortcut: of the blocks that change the shape.
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
        self.relu = layers.branch() if layers.widths.is_binary else layers.relu()  # signs want both halves
        # After the quantizer: a maximum of codes is a code, and onnxruntime pools codes as they are.
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
        if not layers.folded:  # folding fills a folded network, but for the constants of padded shortcuts
            _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) in [0, 1] -> (N, classes) logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.pixels(x)))))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        # Quantized before it is flattened: onnxruntime pools as integers only where the quantizer follows at once.
        logits: Tensor = self.fc(torch.flatten(self.pooled(self.avgpool(plain(self.last(x)))), 1))
        return logits


def _initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions (fan-out, as torchvision's ResNets)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
