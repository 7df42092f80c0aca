"""Numerical precision and compilation of training steps: autocast to bfloat16, TF32, torch.compile.

bfloat16: convolutions and linear layers compute with 8 bits of precision and float32's range, so that no loss scaling
is needed (arXiv:1710.03740; torch.autocast selects the layers). TF32: a GPU rounds the factors of products to 11 bits.
torch allows that for convolutions by default (``torch.backends.cudnn.allow_tf32``), so that quantizers would see other
values than on a CPU or on the target device.

Always in float32: weights, optimizer, quantizers, BatchNorm's statistics, logits, features and losses. Everything that
is evaluated (the monitor, every attack, every exported file) runs in float32 and eager.

Auxiliary passes are those without gradients of weights: they generate attacks or give features to compare with. They
may have a precision of their own, also integer convolutions of codes
(:mod:`robustq.models.quant.integer_convolution`) with float32 for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robustq.models.compiled import replaced_forward
from robustq.models.quant.integer_convolution import lacks_bfloat16, slows_bfloat16
from robustq.recipe.schema import BFLOAT16, FLOAT32, INTEGER, PRECISIONS, SAME, SIDE_PRECISIONS, TF32

WORTH_COMPILING = 1800.0
"""Seconds of a run on a CPU above which compiling pays: it takes a tenth of them and saved a fifth when measured."""


def forbid_tf32() -> None:
    """Compute float32 in float32 on every GPU of this process from now on."""
    _allow(convolutions=False, products=False)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Within it TF32 is allowed, or not, for convolutions and matrix products."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow(convolutions=allowed, products=allowed)
    try:
        yield
    finally:
        _allow(convolutions=convolutions, products=products)


def _allow(*, convolutions: bool, products: bool) -> None:
    # Not the newer fp32_precision: reading these flags afterwards, as torch itself does, would then raise.
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


def compile_notes(device: torch.device, *, cuda_graphs: bool) -> list[str]:
    """Lines for the log of a run that compiles for ``device``."""
    if device.type == "cuda":
        return ["the first step of each kind compiles, which takes a minute or more"]
    lines = ["the first step of each kind compiles, which takes a minute or so each; a step was a fifth shorter then"]
    return [*lines, f"{device} has no CUDA graphs; cuda_graphs has no effect"] if cuda_graphs else lines


@contextmanager
def in_precision(model: nn.Module, precision: str, *, side: str = SAME) -> Iterator[None]:
    """Within it every call of ``model`` computes in ``precision``, its backward pass too, and returns float32.

    Args:
        precision: one of :data:`robustq.recipe.schema.PRECISIONS`.
        side: of auxiliary passes, one of :data:`robustq.recipe.schema.SIDE_PRECISIONS`. ``integer`` means float32
            here; the caller replaces the convolutions.
    """
    assert precision in PRECISIONS and side in SIDE_PRECISIONS
    halves = (precision == BFLOAT16, (precision if side == SAME else side) == BFLOAT16)
    with tf32(allowed=precision == TF32), _in_bfloat16(model, *halves) if any(halves) else nullcontext():
        yield


@contextmanager
def _in_bfloat16(model: nn.Module, training: bool, auxiliary: bool) -> Iterator[None]:
    device = next(model.parameters()).device.type
    inner = model.forward

    def forward(*inputs: Tensor, **named: Any) -> Any:
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters())
        if not (training if trains else auxiliary):
            return inner(*inputs, **named)
        with torch.autocast(device, dtype=torch.bfloat16):
            return inner(*inputs, **named).float()

    # Only around each forward pass: autocast caches converted weights, which weight perturbation makes invalid. The
    # backward pass uses the types of the forward pass.
    with replaced_forward(model, forward):
        yield


def advice(precision: str, device: torch.device, *, key: str = "precision") -> str | None:
    """A better choice if the device has no fast instructions for ``precision``; None if it has, or if it is unknown.

    ``key`` is the recipe's key that sets it.
    """
    if precision == INTEGER and not has_integer_convolution(device):
        return f"torch has no integer convolutions for this {device}; auxiliary passes compute in {FLOAT32}"
    on_gpu = device.type == "cuda"
    lacks_on_gpu = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == BFLOAT16 and (lacks_on_gpu if on_gpu else lacks_bfloat16()):
        return f"this processor has no instructions for {BFLOAT16}; faster: --set {key}={FLOAT32}"
    if precision == BFLOAT16 and not on_gpu and slows_bfloat16():
        return f"this processor multiplies {BFLOAT16} at half the pace of {FLOAT32}; faster: --set {key}={FLOAT32}"
    # Ampere, compute capability 8.0, was the first.
    if precision == TF32 and (not on_gpu or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"only newer GPUs have {TF32}; {device} computes in {FLOAT32}"
    return None


def has_integer_convolution(device: torch.device) -> bool:
    """Whether auxiliary passes can use integer convolutions there; loads the kernel."""
    from robustq.models.quant.integer_convolution import is_available

    return device.type == "cpu" and is_available()
