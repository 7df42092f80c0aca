"""Calibration: the activation scales of a quantized network from a few training images, before the first step.

Each threshold is the fraction of :data:`GRID` with the least mean squared rounding error (the criterion of ACIQ, Banner
et al., arXiv:1810.05723, by search instead of its closed form). Clipping at the maximum would leave 2-bit activations
almost always zero. One forward pass sets all thresholds in network order, so that later layers see quantized inputs; a
quantizer that is called more than once takes the activations of all its calls so far.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from robustq.models.batch_norm import batch_statistics, running_statistics
from robustq.models.quant.binary import SignNorm
from robustq.models.quant.quantizers import LearnedThreshold
from robustq.models.quant.straight_through import code_range

GRID = torch.linspace(0.02, 1.0, 50)
"""Candidate thresholds, as fractions of the largest magnitude seen."""

SAMPLES = 100_000
"""Activations per layer (evenly spaced over the tensor); more move no threshold by a grid step."""


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, *, from_scratch: bool = False) -> None:
    """Set the learned activation thresholds of ``model`` in place; its mode is restored.

    BatchNorm statistics stay, except in a binary network filled with wider weights: the sums of its signs have another
    size, and the BatchNorms in front of signs are new. There all BatchNorms take the statistics of ``images``.

    Args:
        images: (N, C, H, W) float32 in [0, 1], on the model's device; a few hundred training images.
        from_scratch: normalise with the statistics of ``images``; those of a fresh network mean nothing.
    """
    is_binary = any(isinstance(module, SignNorm) for module in model.modules())
    with ExitStack() as hooks:
        for module in model.modules():
            if is_binary and not from_scratch and isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(_take_statistics))
            # Of an activation layer (QuantReLU, QuantIdentity).
            fused: Any = getattr(getattr(module, "act_quant", None), "fused_activation_quant_proxy", None)
            threshold = getattr(getattr(fused, "tensor_quant", None), "scaling_impl", None)
            if isinstance(threshold, LearnedThreshold):
                hooks.enter_context(module.register_forward_pre_hook(_setter(fused.activation_impl, threshold)))
        hooks.enter_context(batch_statistics(model) if from_scratch else running_statistics(model))
        model(images)


def best_threshold(values: Tensor, *, bit_width: int, signed: bool) -> Tensor:
    """The clipping threshold with the least mean squared error over ``values`` (any shape), in their unit.

    Codes run from 0 to 2^bits - 1, or when signed from -2^(bits-1) to 2^(bits-1) - 1 with scale threshold / 2^(bits-1),
    as in Brevitas. Values that are all zero give 1.0. Returns a float64 scalar on their device; the host does not wait.
    """
    flat = _samples(values)
    low, high = code_range(bit_width, signed=signed)
    candidates = GRID.to(flat.device, non_blocking=True).double() * flat.abs().max().double()
    errors = []
    for scale in (candidates / (-low if signed else high)).float().unbind():
        codes = (flat / scale).round_().clamp_(low, high)
        errors.append((codes * scale - flat).square_().mean())
    best = candidates.gather(0, torch.stack(errors).argmin().reshape(1))[0]
    return torch.where(candidates[-1] == 0.0, 1.0, best)


def _samples(values: Tensor) -> Tensor:
    """About :data:`SAMPLES` of the values, float32 (M,), contiguous: otherwise each pass reads a cache line a value."""
    flat = values.detach().flatten().float()
    return flat[:: max(flat.numel() // SAMPLES, 1)].contiguous()


def _take_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = getattr(inputs[0], "value", inputs[0])
    norm.running_mean.copy_(x.mean(dim=(0, 2, 3)))  # type: ignore[operator]
    norm.running_var.copy_(x.var(dim=(0, 2, 3)))  # type: ignore[operator]


def _setter(activation: Any, threshold: LearnedThreshold) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(_samples(activation(inputs[0])))
        values = torch.cat(seen)
        threshold.set_threshold(best_threshold(values, bit_width=threshold.bit_width, signed=threshold.signed))

    return hook
