"""Bit width -> Brevitas quantizers: the one table of how robustq rounds weights, activations, pixels and branches.

Weights are symmetric, narrow-range, with one scale per output channel: the largest magnitude of the channel over
2^(bits-1) - 1, recomputed from the weights in every forward (no state). Activations are unsigned (they follow a ReLU)
with one learned scale per tensor; branches that meet a residual sum are signed 8 bit, exported as uint8 with zero point
128; pixels have the constant scale 1/255, so that every uint8 pixel is its own code.

No quantizer collects statistics in a forward: stock Brevitas activation quantizers do so for their first 300 forwards,
under ``no_grad`` as well, so a clean or an attack pass would move the model under test. Here calibration is one
explicit call (:mod:`robustq.models.quant.calibration`) and the scale moves only through its gradient.

Those of one bit are in :mod:`robustq.models.quant.binary`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant.base import IntQuant, MaxStatsScaling, NarrowIntQuant, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.bias import BiasQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.quant.fused import FusedIntQuant, FusedWeightQuant

FLOAT_BITS = 32
BITS = (32, 8, 4, 3, 2, 1)
"""The widths that a network can be built with; 32 is plain float, 1 is binary."""

PIXEL_SCALE = 1.0 / 255.0


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


class LearnedThreshold(nn.Module):
    """A learned clipping threshold, kept as its logarithm so that a step can neither cross zero nor depend on the unit.

    The scale is threshold / (2^bits - 1), signed threshold / 2^(bits - 1). The gradient with respect to the logarithm
    is multiplied by 1 / sqrt(elements per image * largest code), as learned step size quantization does
    (arXiv:1902.08153, section 2.2): without it a scale, whose gradient is a sum over a whole tensor, moves a thousand
    times faster than a weight.

    Args:
        bit_width: width of the codes.
        signed: whether the codes are signed (two's complement) or start at zero.
    """

    def __init__(self, bit_width: int, signed: bool) -> None:
        super().__init__()
        self.bit_width, self.signed = bit_width, signed
        self.largest_code = 2 ** (bit_width - 1) - 1 if signed else 2**bit_width - 1
        self.log_threshold = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def set_threshold(self, threshold: float) -> None:
        """Put the threshold (in the unit of the activations, over 0) to a calibrated value."""
        self.log_threshold.fill_(math.log(max(threshold, 1e-6)))

    def limited(self, log_threshold: Tensor) -> Tensor:
        """What of ``log_threshold`` counts: all of it, where nothing limits it."""
        return log_threshold

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the scale as a scalar: the threshold over ``threshold``, Brevitas' name for the largest code.

        ``x`` (N, ...) only gives the number of elements of one image.
        """
        log_threshold = self.limited(self.log_threshold)
        if log_threshold.requires_grad and torch.is_grad_enabled():
            per_image = max(x.numel() // max(x.shape[0], 1), 1) if x.dim() else 1
            log_threshold = _ScaleGradient.apply(log_threshold, 1.0 / math.sqrt(per_image * self.largest_code))
        value = log_threshold.exp()
        return value if threshold is None else value / threshold


class FixedScaling(nn.Module):
    """Per-output-channel scales of weights or biases as a buffer, for networks whose BatchNorm was folded away.

    Args:
        scaling_shape: (out_channels, 1, 1, 1) for a convolution's weights, (out_features, 1) for a linear layer's,
            (out_channels,) for biases.
    """

    def __init__(self, scaling_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(scaling_shape))

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the scales, shaped to broadcast over ``x``; they need no division by the largest code."""
        return self.scale


class WeightQuant(NarrowIntQuant, MaxStatsScaling, WeightQuantSolver):  # type: ignore[misc]
    """Symmetric narrow-range weights, one scale per output channel from the channel's largest magnitude."""

    tensor_quant = FusedWeightQuant
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class FoldedWeightQuant(NarrowIntQuant, WeightQuantSolver):  # type: ignore[misc]
    """The same codes with the per-channel scale held in a buffer (after BatchNorm was folded in)."""

    scaling_impl = FixedScaling
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


class _LearnedActScaling(ExtendedInjector):  # type: ignore[misc]
    tensor_quant = FusedIntQuant
    scaling_impl = LearnedThreshold
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP


class ActQuant(_LearnedActScaling, UintQuant, ActQuantSolver):  # type: ignore[misc]
    """Unsigned activations after a ReLU, one learned scale per tensor."""


class BranchQuant(_LearnedActScaling, IntQuant, ActQuantSolver):  # type: ignore[misc]
    """Signed 8-bit input of a residual sum, one learned scale per tensor.

    Signed with zero point 0 here, where rounding x / scale is exact at ties; the exporter shifts the codes by 128 to
    the uint8 that ARM's integer kernels want. The represented values are the same.
    """

    bit_width = 8


class NormalisedQuant(_LearnedActScaling, IntQuant, ActQuantSolver):  # type: ignore[misc]
    """Signed 8-bit input of a network with a normalisation in front of it, one learned scale per tensor.

    Normalised pixels of several channels lie on as many grids, so no one scale can keep them all exactly; it is set and
    learned like those of the activations.
    """

    bit_width = 8


class PixelQuant(UintQuant, ActQuantSolver):  # type: ignore[misc]
    """Pixels in [0, 1]: 8 bit unsigned with the constant scale 1/255."""

    tensor_quant = FusedIntQuant
    bit_width = 8
    scaling_impl_type = ScalingImplType.CONST
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP
    scaling_init = 1.0
    min_val = 0.0
    max_val = 1.0


class BiasQuant(IntQuant, BiasQuantSolver):  # type: ignore[misc]
    """int32 biases with one scale per output channel in a buffer: a whole part of the accumulator's step.

    Folding chooses the part (:func:`robustq.models.quant.folding.bias_steps`). The accumulator's own step, Brevitas'
    ``Int32Bias``, would be coarse at low widths: a 2-bit layer sums up to few of them, and half of one is an answer.
    """

    bit_width = 32
    requires_input_scale = False
    requires_input_bit_width = False
    scaling_impl = FixedScaling
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP


@dataclass(frozen=True)
class Widths:
    """Bit widths of one network's inner layers; the first and last layer are 8 bit in every quantized network."""

    weight_bits: int
    act_bits: int

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight_bits), ("activation", self.act_bits)):
            if bits not in BITS:
                raise UsageError(f"{what} bits {bits} are not in the table; choose one of {', '.join(map(str, BITS))}")
        if (self.weight_bits == FLOAT_BITS) != (self.act_bits == FLOAT_BITS):
            raise UsageError(
                f"weight bits {self.weight_bits} with activation bits {self.act_bits}: 32 (float) goes with 32 only"
            )

    @property
    def is_float(self) -> bool:
        """Whether the network is plain float, without any quantizer."""
        return self.weight_bits == FLOAT_BITS

    @property
    def is_binary(self) -> bool:
        """Whether activations are signs, which asks for other blocks than the wider widths do."""
        return self.act_bits == 1


def learned_thresholds(model: nn.Module) -> dict[str, LearnedThreshold]:
    """The learned activation thresholds of ``model`` by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedThreshold)}


__all__ = [
    "BITS",
    "FLOAT_BITS",
    "PIXEL_SCALE",
    "ActQuant",
    "BiasQuant",
    "BranchQuant",
    "FixedScaling",
    "FoldedWeightQuant",
    "LearnedThreshold",
    "NormalisedQuant",
    "PixelQuant",
    "WeightQuant",
    "Widths",
    "learned_thresholds",
]
