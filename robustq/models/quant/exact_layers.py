"""Folded layers that count like the device: sums of whole numbers, rounded nowhere.

A convolution of dequantized floats rounds in every addition. Once in a million values the sum then falls on the other
side of a rounding boundary of the next quantizer, and at low widths one such code changes many behind it: in a deep
network with small activations every tenth image got visibly other logits than the deployed file gives. On codes the sum
is exact, as in the file's int32 accumulators, and the two agree bit for bit.

Gradients are those of the ordinary layer: whenever autograd records, the layer computes in floats.
"""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor

EXACT_FLOAT32 = 2**24
"""Whole numbers below this are exact in float32, and so is every sum of them that stays below."""


class _CountsCodes:
    """What the two layers share: ``set_input_scale`` once their weights stand, then sums of codes under ``no_grad``."""

    input_scale: float | None = None
    accumulator_dtype = torch.float64

    def set_input_scale(self, scale: float, *, largest_code: int) -> None:
        """Say on which grid the inputs lie: multiples of ``scale``, up to ``largest_code`` of them either way."""
        self.input_scale = scale
        weights, bias = self._codes()
        largest = weights.flatten(1).abs().sum(1).max() * largest_code + bias.abs().max()
        self.accumulator_dtype = torch.float32 if float(largest) < EXACT_FLOAT32 else torch.float64

    def bias_on_its_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """What makes a sum of codes the layer's output, (steps * sum + bias) * unit: one number a channel each.

        Returns:
            float64 (C,) how many steps of the bias one of the accumulator has, float64 (C,) bias codes, float32 (C,) or
            (1,) the step of the bias.
        """
        layer: Any = self
        weight_scale = layer.weight_quant.tensor_quant.scaling_impl.scale.flatten()
        unit: Tensor = layer.bias_quant.tensor_quant.scaling_impl.scale.flatten()
        steps = ((self.input_scale or 0.0) * weight_scale.double() / unit.double()).round()
        # Divided in float32, as the bias quantizer does: on a rounding boundary both must fall on one side.
        return steps, (layer.bias.detach() / unit).round().double(), unit

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Weight and bias codes in float64, both in steps of the bias: the accumulator's own may be coarser."""
        layer: Any = self
        weights = (layer.weight.detach() / layer.weight_quant.tensor_quant.scaling_impl.scale).round().double()
        steps, bias, _ = self.bias_on_its_grid()
        return weights * steps.reshape(-1, *[1] * (weights.dim() - 1)), bias

    def inner_forward_impl(self, x: Tensor, quant_weight: Tensor, quant_bias: Tensor | None) -> Tensor:
        """(N, ...) inputs on their grid -> the layer's float outputs."""
        layer: Any = self
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if self.input_scale is None or traced or torch.is_grad_enabled():
            parts: Any = (x, quant_weight, quant_bias)
            if self.input_scale is not None and not traced:
                # Brevitas' book-keeping of scales is read by nothing behind, and torch.compile cannot follow it.
                parts = (getattr(part, "value", part) for part in parts)
            ordinary: Tensor = super().inner_forward_impl(*parts)  # type: ignore[misc]
            return ordinary
        dtype = self.accumulator_dtype
        weights, bias = self._codes()
        values: Tensor = getattr(x, "value", x)  # of a Brevitas QuantTensor
        codes = (values / self.input_scale).round().to(dtype)
        sums: Tensor = super().inner_forward_impl(codes, weights.to(dtype), bias.to(dtype))  # type: ignore[misc]
        unit = layer.bias_quant.tensor_quant.scaling_impl.scale
        outputs: Tensor = sums.float() * unit.reshape(-1, *[1] * (sums.dim() - 2))
        return outputs


class ExactConv2d(_CountsCodes, qnn.QuantConv2d):  # type: ignore[misc]
    """A folded convolution that sums codes."""


class ExactLinear(_CountsCodes, qnn.QuantLinear):  # type: ignore[misc]
    """A folded linear layer that sums codes."""
