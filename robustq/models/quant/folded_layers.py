"""Layers and quantizers of a folded network: scales in buffers, int32 biases, exact sums; and the folding of one layer.

Under ``no_grad`` the layers sum integer codes, as the int32 accumulators of the deployed file do, and agree with it bit
for bit. A convolution of dequantized floats rounds in every addition: about one sum in a million then falls on the
other side of a rounding tie, and in a deep network of few bits every tenth image got clearly different logits.

While autograd records, they compute in floats, with the gradients of the ordinary layers.
"""

from __future__ import annotations

from dataclasses import dataclass
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

from robustq.models.quant.straight_through import code_range, per_channel

EXACT_FLOAT32 = 2**24  # sums of integers are exact in float32 while they stay below this
LARGEST_BIAS_CODE = 2**30  # a larger one would leave the int32 accumulator no room: such a channel becomes constant
CONSTANT_BIAS_CODE = 2**24  # the bias code of a constant channel: float32 counts up to it exactly
SMALL_BIAS_CODE = 2**20  # below this, float32 divides a bias by its scale and finds the code again
NO_BIAS_SCALE = 1e-30  # of a binary channel that is all zero: its signs cannot be 0, so their unit has to be


@dataclass(frozen=True)
class Grid:
    """The values of a quantized tensor: scale * code, for codes from lowest to highest."""

    scale: float
    lowest: int
    highest: int

    @classmethod
    def of(cls, scale: float, *, bits: int, signed: bool) -> Grid:
        """The grid of a quantizer; the two codes of one bit are -1 and +1."""
        lowest, highest = code_range(bits, signed=signed)
        return cls(scale, lowest, 1 if bits == 1 else highest)


class FixedScaling(nn.Module):
    """Scales of weights or biases per output channel, in a buffer: (C, 1, ...) for weights, (C,) for biases."""

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

    Folding chooses the fraction (:func:`bias_steps`). The step itself, as in Brevitas' ``Int32Bias``, would be coarse
    at low widths: the sums of a 2-bit layer are only a few steps.
    """

    bit_width = 32
    requires_input_scale = False
    requires_input_bit_width = False


class _ExactSums:
    """Mixin of the two layers: after ``set_input_scale`` they sum codes under ``no_grad``."""

    input_scale: float | None = None
    accumulator_dtype = torch.float64

    def set_input_scale(self, scale: float, *, largest_code: int) -> None:
        """Declare the inputs as multiples of ``scale``, of at most ``largest_code`` in magnitude; after the weights."""
        self.input_scale = scale
        weights, bias = self._codes()
        largest = weights.flatten(1).abs().sum(1).max() * largest_code + bias.abs().max()
        self.accumulator_dtype = torch.float32 if float(largest) < EXACT_FLOAT32 else torch.float64

    def bias_codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the layer's output, (steps * sum of codes + bias) * scale, per channel.

        Steps of the bias in one of the accumulator and bias codes are float64 (C,), the scale float32 (C,) or (1,).
        """
        layer: Any = self
        scale = scale_of(layer.bias_quant).flatten()
        steps = (self.input_scale or 0.0) * scale_of(layer.weight_quant).flatten().double() / scale.double()
        # Divided in float32, as the bias quantizer does, so that both agree on rounding ties.
        return steps.round(), (layer.bias.detach() / scale).round().double(), scale

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Weight and bias codes in float64, both in steps of the bias."""
        layer: Any = self
        weights = (layer.weight.detach() / scale_of(layer.weight_quant)).round().double()
        steps, bias, _ = self.bias_codes()
        return weights * steps.reshape(per_channel(weights)), bias

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
        codes = (getattr(x, "value", x) / self.input_scale).round().to(dtype)
        sums: Tensor = super().inner_forward_impl(codes, weights.to(dtype), bias.to(dtype))  # type: ignore[misc]
        return sums.float() * scale_of(layer.bias_quant).reshape(-1, *[1] * (sums.dim() - 2))


class ExactConv2d(_ExactSums, qnn.QuantConv2d):  # type: ignore[misc]
    """A folded convolution that sums codes."""


class ExactLinear(_ExactSums, qnn.QuantLinear):  # type: ignore[misc]
    """A folded linear layer that sums codes."""


def scale_of(proxy: Any) -> Tensor:
    """The buffer of a quantizer with fixed scales: ``weight_quant`` or ``bias_quant`` of a folded layer."""
    scale: Tensor = proxy.tensor_quant.scaling_impl.scale
    return scale


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as y = gain * x + shift: (C,) float64 each, on the CPU."""
    gain = norm.weight.detach().cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    return gain, norm.bias.detach().cpu().double() - norm.running_mean.cpu().double() * gain


def bias_steps(largest_weight: int, input_grid: Grid) -> int:
    """Steps of the bias in one of the accumulator (input scale * weight scale).

    The integer file multiplies its int8 weight codes by this number, which makes the accumulator's step as fine as the
    bias'. It is the largest that fits in 127 and keeps two products of an activation and a weight within 2^15 - 1,
    where onnxruntime's AVX2 kernels saturate.
    """
    span = input_grid.highest - input_grid.lowest  # of the codes as uint8
    return max(min(127 // largest_weight, (2**15 - 1) // (2 * span * largest_weight)), 1)


@torch.no_grad()
def fold_layer(layer: Any, norm: nn.Module | None, target: Any, grid: Grid | None) -> None:
    """Write a layer, float or quantized, with the BatchNorm behind it (or None) into a folded layer on the CPU.

    ``grid`` is that of the layer's inputs, None in a float network.
    """
    channels, shape = len(layer.weight), per_channel(layer.weight)
    shift = torch.zeros(channels).double() if layer.bias is None else layer.bias.detach().cpu().double()
    gain = torch.ones(channels).double()
    if norm is not None:
        gain, norm_shift = affine(norm)
        shift = norm_shift + gain * shift  # BatchNorm scales the layer's bias too
    if grid is None:
        weight = layer.weight.detach().cpu().double()
        target.weight.copy_(weight * gain.reshape(shape))
        target.bias.copy_(shift)
        return
    quantized = layer.quant_weight()
    # Not Brevitas' int(), which fails for a binary layer of one sign.
    codes = (quantized.value / quantized.scale).round().detach().cpu().double()
    bits = int(quantized.bit_width)
    largest_weight = 1 if bits == 1 else 2 ** (bits - 1) - 1
    # A linear layer may be exported as MatMul and Add, whose weights no lowering pass multiplies; onnxruntime (1.32)
    # fuses both into a QGemm without a look at the unit of the bias.
    steps = 1 if isinstance(target, nn.Linear) else bias_steps(largest_weight, grid)
    scale = quantized.scale.detach().cpu().double().flatten().expand(channels) * gain.abs()
    bias_codes = shift.abs() * steps / (grid.scale * scale)
    # Below this the accumulator's scale is no normal float32: it would lose digits or become 0, and the codes NaN.
    smallest = torch.finfo(torch.float32).tiny * steps / min(grid.scale, 1.0)
    constant = (bias_codes > LARGEST_BIAS_CODE) | (scale < smallest)
    codes[constant] = 1.0 if bits == 1 else 0.0
    bias_code = LARGEST_BIAS_CODE if bits == 1 else CONSTANT_BIAS_CODE
    holds_bias = shift.abs() * steps / (grid.scale * bias_code)
    nothing = torch.full_like(scale, NO_BIAS_SCALE if bits == 1 else 1.0)
    scale = torch.where(constant, torch.where(holds_bias >= smallest, holds_bias, nothing), scale)
    weight_scale, bias_scale = scale_of(target.weight_quant), scale_of(target.bias_quant)
    weight_scale.copy_(scale.reshape(weight_scale.shape))
    bias_scale.copy_(grid.scale * scale / steps)
    signs = torch.where(constant, 1.0, gain.sign()).reshape(shape)
    target.weight.copy_((codes * signs).float().reshape(target.weight.shape) * weight_scale)
    target.bias.copy_(_on_grid(shift.float(), bias_scale))
    target.set_input_scale(grid.scale, largest_code=max(-grid.lowest, grid.highest))


def _on_grid(bias: Tensor, scale: Tensor) -> Tensor:
    """Biases (C,) float32 as multiples of ``scale``, also when float32 divides them by it.

    A code of millions times its scale, divided by the scale, may come out half a step off; exporters take that for a
    float bias. Then a neighbouring code is used, 1e-7 of the bias away.
    """
    codes = (bias / scale).round()
    for step in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8):
        moved = codes + step
        stays = codes * scale / scale == codes
        codes = torch.where(stays | (moved * scale / scale != moved), codes, moved)
    return torch.where(codes.abs() < SMALL_BIAS_CODE, bias, codes * scale)
