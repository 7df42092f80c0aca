"""Layers that every architecture is built from: float torch layers at 32 bits, Brevitas layers below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.quant import folded_layers, quantizers
from robustq.models.quant.binary import BinaryActQuant, BinaryWeightQuant, ChannelThresholds, SignNorm
from robustq.models.quant.quantizers import Widths

OUTER_BITS = 8
"""Width of the first and the last layer, and of every residual branch, in a quantized network."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, standard deviation), one number per channel each, of images in [0, 1]."""

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Normalisation of torchvision's pretrained weights."""


class Normalise(nn.Module):
    """(x - mean) / std per channel, in float: the first operation of a network that was trained on normalised images.

    Epsilon stays a distance between pixels. The constants are part of the spec, not of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] -> the same shape, normalised."""
        return (x - self.mean) / self.std


def parse_normalisation(text: str, *, channels: int) -> Normalisation | None:
    """``imagenet``, ``none``, or ``MEAN/STD`` with comma-separated numbers: ``0.49,0.48,0.45/0.25,0.24,0.26``.

    One number stands for every channel. UsageError for no numbers, another count, or a deviation that is not positive.
    """
    advice = "give imagenet, none, or MEAN/STD such as 0.49,0.48,0.45/0.25,0.24,0.26"
    if text == "none":
        return None
    rows: list[tuple[float, ...]] = list(IMAGENET)
    if text != "imagenet":
        try:
            rows = [tuple(map(float, half.split(","))) for half in text.split("/")]
        except ValueError as error:
            raise UsageError(f"normalisation '{text}' is not numbers; {advice}") from error
        if len(rows) != 2:
            raise UsageError(f"normalisation '{text}' has {len(rows)} parts between '/', not 2; {advice}")
        rows = [row * channels if len(row) == 1 else row for row in rows]
    mean, std = rows
    if len(mean) != channels or len(std) != channels:
        raise UsageError(f"normalisation '{text}' has {len(mean)} and {len(std)} numbers, the data {channels} channels")
    if not all(abs(value) < 1e6 for value in mean) or not all(0.0 < value < 1e6 for value in std):
        raise UsageError(f"normalisation '{text}' needs finite means and deviations over 0; {advice}")
    return mean, std


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Args:
        widths: bit widths of the inner layers.
        folded: omit BatchNorm and give every convolution a bias (int32 when quantized), for
            :func:`robustq.models.quant.folding.fold`. Activations then are QuantTensors, whose scale the folding reads.
        normalisation: mean and standard deviation that are applied first, in float.
        shared_sum_scale: quantize both inputs of a residual sum by one quantizer, so that FINN can move the scale
            behind the sum; not for binary activations.
    """

    widths: Widths
    folded: bool = False
    normalisation: Normalisation | None = None
    shared_sum_scale: bool = False

    def pixels(self) -> nn.Module:
        """Input quantizer: constant scale 1/255, so that uint8 pixels are codes; learned after a normalisation."""
        if self.normalisation is None:
            return self._quantizer(quantizers.PixelQuant)
        normalise = Normalise(self.normalisation)
        if self.widths.is_float:
            return normalise
        return nn.Sequential(normalise, self._quantizer(quantizers.NormalisedQuant))

    def _quantizer(self, quantizer: Any, **options: int) -> nn.Module:
        """Nothing in a float network."""
        if self.widths.is_float:
            return nn.Identity()
        layer: nn.Module = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=self.folded, **options)
        return layer

    def conv(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, outer: bool = False
    ) -> nn.Module:
        """Convolution with 'same' padding at stride 1, without bias (BatchNorm follows) unless folded.

        ``outer`` makes it 8 bit in a quantized network of any width, as the first layer is.
        """
        shape = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        bits = OUTER_BITS if outer else self.widths.weight_bits
        return self._layer((nn.Conv2d, qnn.QuantConv2d, folded_layers.ExactConv2d), *shape, bias=self.folded, bits=bits)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """The last layer, with a bias, which is int32 when folded."""
        kinds = (nn.Linear, qnn.QuantLinear, folded_layers.ExactLinear)
        return self._layer(kinds, in_features, out_features, bias=True, bits=OUTER_BITS)

    def _layer(self, kinds: tuple[Any, Any, Any], *shape: int, bias: bool, bits: int) -> nn.Module:
        """One of three kinds: float, quantized, or quantized and folded."""
        layer_type, options = kinds[0], {}
        if not self.widths.is_float:
            layer_type = kinds[2] if self.folded else kinds[1]
            options = {
                "bias_quant": folded_layers.BiasQuant if self.folded else None,
                **weight_quantizer(bits, folded=self.folded),
            }
        layer: nn.Module = layer_type(*shape, bias=bias, **options)
        return layer

    def batch_norm(self, channels: int) -> nn.Module:
        """BatchNorm; nothing in a folded network."""
        return nn.Identity() if self.folded else nn.BatchNorm2d(channels)

    def sign_norm(self, channels: int) -> nn.Module:
        """BatchNorm in front of a sign; its thresholds in a folded network."""
        return ChannelThresholds(channels) if self.folded else SignNorm(channels)

    def sign(self) -> nn.Module:
        """Binary activations, -1 or +1."""
        return self._quantizer(BinaryActQuant)

    def relu(self) -> nn.Module:
        """ReLU and the unsigned activation quantizer; 8 bit in a binary network."""
        if self.widths.is_float:
            return nn.ReLU()
        bits = OUTER_BITS if self.widths.is_binary else self.widths.act_bits
        layer: nn.Module = quantizers.QuantReLU(bit_width=bits, return_quant_tensor=self.folded)
        return layer

    def branch(self) -> nn.Module:
        """Signed 8-bit quantizer of an input of a residual sum, and in a binary network of the sum itself."""
        return self._quantizer(quantizers.BranchQuant)

    def pooled(self) -> nn.Module:
        """Unsigned 8-bit quantizer of the pooled features, the input of the last layer."""
        return self._quantizer(quantizers.ActQuant, bit_width=OUTER_BITS)


def weight_quantizer(bits: int, *, folded: bool) -> dict[str, Any]:
    """The keyword arguments that give a Brevitas layer weights of ``bits`` bits."""
    if bits == 1:
        return {"weight_quant": folded_layers.FoldedBinaryWeightQuant if folded else BinaryWeightQuant}
    return {
        "weight_quant": folded_layers.FoldedWeightQuant if folded else quantizers.WeightQuant,
        "weight_bit_width": bits,
    }


def same_shape(layer: Any, layer_type: Any, **options: Any) -> Any:
    """A ``layer_type`` of the shape of a convolution or linear layer, with fresh weights."""
    if isinstance(layer, nn.Linear):
        return layer_type(layer.in_features, layer.out_features, **options)
    options |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return layer_type(layer.in_channels, layer.out_channels, layer.kernel_size, **options)


def plain(x: Tensor) -> Tensor:
    """The tensor inside a Brevitas QuantTensor (sums and pooling need no scale), or ``x`` itself."""
    value: Tensor = getattr(x, "value", x)
    return value
