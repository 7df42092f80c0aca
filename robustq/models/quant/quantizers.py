"""Bit width -> Brevitas quantizers: the one table of how robustq rounds weights, activations, pixels and branches.

| tensor | codes | scale |
|---|---|---|
| weights | symmetric, narrow range | per output channel: largest magnitude / (2^(bits-1) - 1), in every forward |
| activations after a ReLU | unsigned | learned, one per tensor |
| branches of a residual sum | signed 8 bit (exported as uint8 with zero point 128) | learned, one per tensor |
| pixels | unsigned 8 bit | constant 1/255: every uint8 pixel is its own code |

No forward collects statistics. Stock Brevitas activation quantizers do so for their first 300 forwards, under
``no_grad`` too, so that a clean or attack pass would change the model under test. Here only calibration
(:mod:`robustq.models.quant.calibration`) and gradients move a scale. One-bit quantizers are in
:mod:`robustq.models.quant.binary`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant.base import IntQuant, MaxStatsScaling, NarrowIntQuant, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.quant.straight_through import FusedIntQuant, FusedReLUQuant, FusedWeightQuant, code_range

FLOAT_BITS = 32
BITS = (32, 8, 4, 3, 2, 1)
"""The bit widths of networks; 32 is plain float, 1 is binary."""

PIXEL_SCALE = 1.0 / 255.0


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class LearnedThreshold(nn.Module):
    """A learned clipping threshold, stored as its logarithm: a step cannot cross zero, and its unit does not matter.

    The scale is threshold / (2^bits - 1), signed threshold / 2^(bits - 1). The gradient for the logarithm is multiplied
    by 1 / sqrt(elements per image * largest code), as in learned step size quantization (arXiv:1902.08153, section
    2.2): it is a sum over a tensor, and without the factor a scale moves a thousand times faster than a weight.
    """

    def __init__(self, bit_width: int, signed: bool) -> None:
        super().__init__()
        self.bit_width, self.signed = bit_width, signed
        self.largest_code = code_range(bit_width, signed=signed)[1]
        self.log_threshold = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set a calibrated threshold (positive, in the unit of the activations), a number or a float64 scalar."""
        if isinstance(threshold, Tensor):
            self.log_threshold.copy_(threshold.clamp(min=1e-6).log())
        else:
            self.log_threshold.fill_(math.log(max(threshold, 1e-6)))

    def limited(self, log_threshold: Tensor) -> Tensor:
        """``log_threshold`` within the bound of a subclass."""
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


class WeightQuant(NarrowIntQuant, MaxStatsScaling, WeightQuantSolver):  # type: ignore[misc]
    """Symmetric narrow-range weights, one scale per output channel from the channel's largest magnitude."""

    tensor_quant = FusedWeightQuant
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

    The zero point is 0 here, where rounding x / scale is exact at ties. The exporter shifts the codes by 128 to the
    uint8 of ARM's integer kernels; the represented values are the same.
    """

    bit_width = 8


class NormalisedQuant(BranchQuant):
    """Signed 8-bit input of a network after a normalisation, which gives each channel a grid of its own."""


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


class QuantReLU(qnn.QuantReLU):  # type: ignore[misc]
    """Brevitas' QuantReLU over ``ActQuant`` as one function, ``FusedReLUQuant``.

    Values and gradients of finite numbers are the same; two layers would write the tensor between them to memory.
    """

    def __init__(self, *, bit_width: int, return_quant_tensor: bool = False) -> None:
        super().__init__(act_quant=ActQuant, bit_width=bit_width, return_quant_tensor=return_quant_tensor)

    def forward(self, x: Any) -> Any:
        """(...) float -> the same shape, quantized."""
        # At every call: Brevitas makes a new quantizer when a state dict is loaded, and for another width.
        proxy: Any = self.act_quant
        separate = proxy.fused_activation_quant_proxy
        if not isinstance(separate, FusedReLUQuant) and isinstance(separate.tensor_quant, FusedIntQuant):
            fused = FusedReLUQuant(separate.activation_impl, separate.tensor_quant)
            proxy.fused_activation_quant_proxy = fused.train(separate.training)
        return super().forward(x)


@dataclass(frozen=True)
class Widths:
    """Bit widths of one network's inner layers; the first and last layer are 8 bit in every quantized network."""

    weight_bits: int
    act_bits: int

    def __post_init__(self) -> None:
        for kind, bits in (("weight", self.weight_bits), ("activation", self.act_bits)):
            if bits not in BITS:
                raise UsageError(f"{kind} bits {bits} are not in the table; choose one of {', '.join(map(str, BITS))}")
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
        """Whether activations are binary, which needs other blocks."""
        return self.act_bits == 1


def learned_thresholds(model: nn.Module) -> dict[str, LearnedThreshold]:
    """The learned activation thresholds of ``model`` by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedThreshold)}
