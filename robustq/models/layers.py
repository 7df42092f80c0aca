"""The layers that every architecture is built from: float torch layers at 32 bits, Brevitas layers below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
from torch import Tensor, nn

from robustq.models.normalise import Normalisation, Normalise
from robustq.models.quant.binary import (
    BinaryActQuant,
    BinaryWeightQuant,
    ChannelThresholds,
    FoldedBinaryWeightQuant,
    SignNorm,
)
from robustq.models.quant.exact_layers import ExactConv2d, ExactLinear
from robustq.models.quant.quantizers import (
    ActQuant,
    BiasQuant,
    BranchQuant,
    FoldedWeightQuant,
    NormalisedQuant,
    PixelQuant,
    WeightQuant,
    Widths,
)
from robustq.models.quant.relu import QuantReLU

OUTER_BITS = 8
"""Width of the first and the last layer, and of every residual branch, in a quantized network."""


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Args:
        widths: bit widths of the inner layers.
        folded: leave BatchNorm out and give every convolution a bias (int32 when quantized): the network that
            :func:`robustq.models.quant.folding.fold` fills. Activations then carry their scale along, which int32
            biases need.
        normalisation: mean and standard deviation that stand in front of everything, in float.
        shared_sum_scale: quantize both inputs of a residual sum by one quantizer, which FINN needs to move the scale
            behind the sum; not for binary activations.
    """

    widths: Widths
    folded: bool = False
    normalisation: Normalisation | None = None
    shared_sum_scale: bool = False

    def pixels(self) -> nn.Module:
        """Input quantizer: scale 1/255, so that uint8 pixels stay as they are; behind a normalisation, learned."""
        if self.normalisation is not None:
            normalise = Normalise(self.normalisation)
            return normalise if self.widths.is_float else nn.Sequential(normalise, self._quantizer(NormalisedQuant))
        return nn.Identity() if self.widths.is_float else self._quantizer(PixelQuant)

    def _quantizer(self, quantizer: Any, **options: int) -> nn.Module:
        layer: nn.Module = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=self.folded, **options)
        return layer

    def conv(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, outer: bool = False
    ) -> nn.Module:
        """Convolution with 'same' padding at stride 1, without bias (BatchNorm follows) unless folded.

        ``outer`` makes it 8 bit in a quantized network of any width, as the first layer is.
        """
        shape = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        if self.widths.is_float:
            return nn.Conv2d(*shape, bias=self.folded)
        conv_type = ExactConv2d if self.folded else qnn.QuantConv2d
        layer: nn.Module = conv_type(
            *shape,
            bias=self.folded,
            bias_quant=BiasQuant if self.folded else None,
            **weight_quantizer(OUTER_BITS if outer else self.widths.weight_bits, folded=self.folded),
        )
        return layer

    def batch_norm(self, channels: int) -> nn.Module:
        """BatchNorm, or nothing in a folded network."""
        return nn.Identity() if self.folded else nn.BatchNorm2d(channels)

    def sign_norm(self, channels: int) -> nn.Module:
        """BatchNorm in front of a sign; folded, its thresholds."""
        return ChannelThresholds(channels) if self.folded else SignNorm(channels)

    def sign(self) -> nn.Module:
        """Binary activations, -1 or +1."""
        return self._quantizer(BinaryActQuant)

    def relu(self) -> nn.Module:
        """ReLU and the unsigned activation quantizer; 8 bit in a binary network, which has one, before pooling."""
        if self.widths.is_float:
            return nn.ReLU()
        bits = OUTER_BITS if self.widths.is_binary else self.widths.act_bits
        layer: nn.Module = QuantReLU(bit_width=bits, return_quant_tensor=self.folded)
        return layer

    def branch(self) -> nn.Module:
        """Signed 8-bit quantizer of what meets a residual sum, and in a binary network of the sum itself."""
        return nn.Identity() if self.widths.is_float else self._quantizer(BranchQuant)

    def pooled(self) -> nn.Module:
        """Quantizer of the pooled features, the last layer's 8-bit input (they are averages of values after a ReLU)."""
        return nn.Identity() if self.widths.is_float else self._quantizer(ActQuant, bit_width=OUTER_BITS)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """The last layer, with bias; its float bias becomes int32 when folded."""
        if self.widths.is_float:
            return nn.Linear(in_features, out_features)
        linear_type = ExactLinear if self.folded else qnn.QuantLinear
        layer: nn.Module = linear_type(
            in_features,
            out_features,
            bias=True,
            bias_quant=BiasQuant if self.folded else None,
            **weight_quantizer(OUTER_BITS, folded=self.folded),
        )
        return layer


def weight_quantizer(bits: int, *, folded: bool) -> dict[str, Any]:
    """The keyword arguments that give a Brevitas layer weights of ``bits`` bits."""
    if bits == 1:
        return {"weight_quant": FoldedBinaryWeightQuant if folded else BinaryWeightQuant}
    return {"weight_quant": FoldedWeightQuant if folded else WeightQuant, "weight_bit_width": bits}


def plain(x: Tensor) -> Tensor:
    """The tensor itself when ``x`` is a Brevitas QuantTensor (sums and pooling need no scales), else ``x``."""
    value: Tensor = getattr(x, "value", x)
    return value
