"""Layers and quantizers of a folded network: scales in buffers, int32 biases, and sums that are exact.

Under ``no_grad`` the layers sum integer codes, as the int32 accumulators of the deployed file do, and agree with it bit
for bit. A convolution of dequantized floats rounds in every addition: about one sum in a million then falls on the
other side of a rounding tie, and in a deep network of few bits every tenth image got clearly different logits.

While autograd records, they compute in floats, with the gradients of the ordinary layers.
"""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.core.quant import BinaryQuant
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant.base import IntQuant, NarrowIntQuant
from brevitas.quant.solver.bias import BiasQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn

EXACT_FLOAT32 = 2**24
"""Sums of integers are exact in float32 while they stay below this."""


class FixedScaling(nn.Module):
    """Scales of weights or biases per output channel, in a buffer.

    Args:
        scaling_shape: (out_channels, 1, 1, 1) for a convolution's weights, (out_features, 1) for a linear layer's,
            (out_channels,) for biases.
    """

    def __init__(self, scaling_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(scaling_shape))

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the scales, shaped to broadcast over ``x``."""
        return self.scale


class _FixedScale(ExtendedInjector):  # type: ignore[misc]
    scaling_impl = FixedScaling
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class FoldedWeightQuant(_FixedScale, NarrowIntQuant, WeightQuantSolver):  # type: ignore[misc]
    """The codes of ``WeightQuant`` with fixed scales."""


class FoldedBinaryWeightQuant(_FixedScale, WeightQuantSolver):  # type: ignore[misc]
    """The signs of ``BinaryWeightQuant`` with fixed scales."""

    tensor_quant = BinaryQuant
    bit_width = 1
    signed = True
    narrow_range = True


class BiasQuant(_FixedScale, IntQuant, BiasQuantSolver):  # type: ignore[misc]
    """int32 biases with fixed scales, each an integer fraction of the accumulator's step.

    Folding chooses the fraction (:func:`robustq.models.quant.folding.bias_steps`). The step itself, as in Brevitas'
    ``Int32Bias``, would be coarse at low widths: the sums of a 2-bit layer are only a few steps.
    """

    bit_width = 32
    requires_input_scale = False
    requires_input_bit_width = False


class _ExactSums:
    """Mixin of the two layers: set ``set_input_scale`` after the weights, then they sum codes under ``no_grad``."""

    input_scale: float | None = None
    accumulator_dtype = torch.float64

    def set_input_scale(self, scale: float, *, largest_code: int) -> None:
        """Declare the inputs as multiples of ``scale``, of at most ``largest_code`` in magnitude."""
        self.input_scale = scale
        weights, bias = self._codes()
        largest = weights.flatten(1).abs().sum(1).max() * largest_code + bias.abs().max()
        self.accumulator_dtype = torch.float32 if float(largest) < EXACT_FLOAT32 else torch.float64

    def bias_codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the layer's output, (steps * sum of codes + bias) * scale, per channel.

        Returns:
            float64 (C,) steps of the bias in one of the accumulator, float64 (C,) bias codes, float32 (C,) or (1,)
            scale of the bias.
        """
        layer: Any = self
        weight_scale = layer.weight_quant.tensor_quant.scaling_impl.scale.flatten()
        scale: Tensor = layer.bias_quant.tensor_quant.scaling_impl.scale.flatten()
        steps = ((self.input_scale or 0.0) * weight_scale.double() / scale.double()).round()
        # Divided in float32, as the bias quantizer does, so that both agree on rounding ties.
        return steps, (layer.bias.detach() / scale).round().double(), scale

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Weight and bias codes in float64, both in steps of the bias."""
        layer: Any = self
        weights = (layer.weight.detach() / layer.weight_quant.tensor_quant.scaling_impl.scale).round().double()
        steps, bias, _ = self.bias_codes()
        return weights * steps.reshape(-1, *[1] * (weights.dim() - 1)), bias

    def inner_forward_impl(self, x: Tensor, quant_weight: Tensor, quant_bias: Tensor | None) -> Tensor:
        """(N, ...) multiples of the input scale -> the layer's float outputs."""
        layer: Any = self
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if self.input_scale is None or traced or torch.is_grad_enabled():
            parts: Any = (x, quant_weight, quant_bias)
            if self.input_scale is not None and not traced:
                # Plain tensors: nothing after this reads the scales, and torch.compile cannot trace QuantTensors.
                parts = (getattr(part, "value", part) for part in parts)
            ordinary: Tensor = super().inner_forward_impl(*parts)  # type: ignore[misc]
            return ordinary
        dtype = self.accumulator_dtype
        weights, bias = self._codes()
        values: Tensor = getattr(x, "value", x)
        codes = (values / self.input_scale).round().to(dtype)
        sums: Tensor = super().inner_forward_impl(codes, weights.to(dtype), bias.to(dtype))  # type: ignore[misc]
        scale = layer.bias_quant.tensor_quant.scaling_impl.scale
        outputs: Tensor = sums.float() * scale.reshape(-1, *[1] * (sums.dim() - 2))
        return outputs


class ExactConv2d(_ExactSums, qnn.QuantConv2d):  # type: ignore[misc]
    """A folded convolution that sums codes."""


class ExactLinear(_ExactSums, qnn.QuantLinear):  # type: ignore[misc]
    """A folded linear layer that sums codes."""
