"""Binary networks for QCDQ, which has integers and clipping but no binary quantizer.

Binary weights become 2-bit codes that never use 0. A binary activation becomes an integer clipped to [-1, 1] that is
never 0: the thresholds in front of it lie half-way between two codes of their input, so that every distance to them is
odd in half steps of that input. The logits are the same, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant.base import NarrowIntQuant
from brevitas.quant.solver.act import ActQuantSolver
from torch import Tensor, nn

from robustq.errors import ExportError
from robustq.models.layers import same_shape, weight_quantizer
from robustq.models.quant.binary import ChannelThresholds
from robustq.models.quant.folded_layers import BiasQuant

TERNARY_BITS = 2
"""Width of the codes -1, 0 and 1."""


class _ClippedSign(NarrowIntQuant, ActQuantSolver):  # type: ignore[misc]
    """round(x) clipped to [-1, 1]: the sign of odd numbers."""

    bit_width = TERNARY_BITS
    scaling_impl_type = ScalingImplType.CONST
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP
    scaling_init = 1.0


class _OddThresholds(nn.Module):
    """``thresholds`` of a folded binary block, with distances that are odd numbers."""

    gain: Tensor
    threshold: Tensor

    def __init__(self, thresholds: ChannelThresholds) -> None:
        super().__init__()
        first, upper = thresholds.first_codes()
        varies = thresholds.gain.flatten() != 0
        direction = torch.where(varies, torch.where(upper, 1.0, -1.0), 0.0)
        odd = torch.where(varies, direction * (2 * first - 1), torch.where(upper, -1.0, 1.0))
        self.register_buffer("gain", (direction * 2 / thresholds.step).reshape(-1, 1, 1))
        self.register_buffer("threshold", odd.float().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) values on the grid -> odd numbers of the same shape."""
        value = getattr(x, "value", x)
        distances: Tensor = self.gain * value - self.threshold
        return distances


def without_binary_quantizers(folded: nn.Module) -> nn.Module:
    """The same network without binary quantizers; ``folded`` itself where it has none.

    Raises:
        ExportError: no thresholds in front of a binary activation, so that its input could be 0.
    """
    if not any(_is_binary(module, "weight_quant") or _is_binary(module, "act_quant") for module in folded.modules()):
        return folded
    twin = copy.deepcopy(folded)
    for name, module in list(twin.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, ChannelThresholds):
                module.add_module(child_name, _OddThresholds(child))
            elif _is_binary(child, "act_quant"):
                # A block runs its modules in their order.
                names = [each for each, _ in module.named_children()]
                before = module.get_submodule(names[names.index(child_name) - 1])
                if not isinstance(before, _OddThresholds | ChannelThresholds):
                    raise ExportError(f"{name}.{child_name}: has no thresholds in front of it; QCDQ cannot hold it")
                module.add_module(child_name, qnn.QuantIdentity(act_quant=_ClippedSign, return_quant_tensor=True))
            elif _is_binary(child, "weight_quant"):
                module.add_module(child_name, _two_bit_layer(child))
    return twin.eval()


def quantizes(module: nn.Module, quantizer: str = "act_quant") -> bool:
    """Whether ``module`` has a quantizer of this name; a custom module may have another part of it."""
    return bool(getattr(getattr(module, quantizer, None), "is_quant_enabled", False))


def _is_binary(module: nn.Module, quantizer: str) -> bool:
    return quantizes(module, quantizer) and int(getattr(module, quantizer).bit_width()) == 1


@torch.no_grad()
def _two_bit_layer(layer: Any) -> nn.Module:
    options = {**weight_quantizer(TERNARY_BITS, folded=True), "bias_quant": BiasQuant}
    kind = qnn.QuantLinear if isinstance(layer, nn.Linear) else qnn.QuantConv2d
    twin = same_shape(layer, kind, bias=True, **options)
    twin.weight.copy_(layer.weight)
    twin.bias.copy_(layer.bias)
    for which in ("weight_quant", "bias_quant"):
        own, given = (getattr(one, which).tensor_quant.scaling_impl.scale for one in (twin, layer))
        own.copy_(given)
    made: nn.Module = twin
    return made
