"""The layers that every architecture is built from: float torch layers at 32 bits, Brevitas layers below."""

from __future__ import annotations

from dataclasses import dataclass

import brevitas.nn as qnn
from torch import Tensor, nn

from robustq.models.quantizers import (
    ActQuant,
    BiasQuant,
    BranchQuant,
    FoldedWeightQuant,
    PixelQuant,
    WeightQuant,
    Widths,
)

OUTER_BITS = 8
"""Width of the first and the last layer, and of every residual branch, in a quantized network."""


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Args:
        widths: bit widths of the inner layers.
        folded: leave BatchNorm out and give every convolution a bias (int32 when quantized): the network that
            :func:`robustq.models.folding.fold` fills. Activations then carry their scale along, which int32 biases
            need.
    """

    widths: Widths
    folded: bool = False

    def pixels(self) -> nn.Module:
        """Input quantizer: scale 1/255, so that uint8 pixels stay as they are."""
        if self.widths.is_float:
            return nn.Identity()
        layer: nn.Module = qnn.QuantIdentity(act_quant=PixelQuant, return_quant_tensor=self.folded)
        return layer

    def conv(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, first: bool = False
    ) -> nn.Module:
        """Convolution with 'same' padding at stride 1, without bias (BatchNorm follows) unless folded."""
        shape = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        if self.widths.is_float:
            return nn.Conv2d(*shape, bias=self.folded)
        layer: nn.Module = qnn.QuantConv2d(
            *shape,
            bias=self.folded,
            weight_quant=FoldedWeightQuant if self.folded else WeightQuant,
            weight_bit_width=OUTER_BITS if first else self.widths.weight_bits,
            bias_quant=BiasQuant if self.folded else None,
        )
        return layer

    def batch_norm(self, channels: int) -> nn.Module:
        """BatchNorm, or nothing in a folded network."""
        return nn.Identity() if self.folded else nn.BatchNorm2d(channels)

    def relu(self) -> nn.Module:
        """ReLU and the unsigned activation quantizer."""
        if self.widths.is_float:
            return nn.ReLU()
        layer: nn.Module = qnn.QuantReLU(
            act_quant=ActQuant, bit_width=self.widths.act_bits, return_quant_tensor=self.folded
        )
        return layer

    def branch(self) -> nn.Module:
        """Quantizer of a convolution's output that meets a residual sum (8 bit)."""
        return nn.Identity() if self.widths.is_float else qnn.QuantIdentity(act_quant=BranchQuant)

    def pooled(self) -> nn.Module:
        """Quantizer of the pooled features, the last layer's 8-bit input (they are averages of values after a ReLU)."""
        if self.widths.is_float:
            return nn.Identity()
        layer: nn.Module = qnn.QuantIdentity(act_quant=ActQuant, bit_width=OUTER_BITS, return_quant_tensor=self.folded)
        return layer

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """The last layer, with bias; its float bias becomes int32 when folded."""
        if self.widths.is_float:
            return nn.Linear(in_features, out_features)
        layer: nn.Module = qnn.QuantLinear(
            in_features,
            out_features,
            bias=True,
            weight_quant=FoldedWeightQuant if self.folded else WeightQuant,
            weight_bit_width=OUTER_BITS,
            bias_quant=BiasQuant if self.folded else None,
        )
        return layer


def plain(x: Tensor) -> Tensor:
    """The tensor itself when ``x`` is a Brevitas QuantTensor (sums and pooling need no scales), else ``x``."""
    value: Tensor = getattr(x, "value", x)
    return value
