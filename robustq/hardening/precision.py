"""The numbers that a training step computes in: float32, or what is faster where the arithmetic is.

In bfloat16 convolutions and linear layers take and give numbers of 8 bits' precision and float32's range (mixed
precision after arXiv:1710.03740, whose loss scaling such a range needs not; torch.autocast decides which layers). In
TF32 a GPU rounds what they multiply to 11 bits and takes and gives float32. What must be exact stays in float32:
weights, the optimiser, the quantizers' arithmetic, BatchNorm's statistics, logits, features and losses. Whatever is
judged is judged in float32: the monitor, every attack, every file.

Passes on the side are those in which no weight asks for a gradient: they craft images, of whose gradient a method
mostly takes the signs, or give features to compare with. They may have a precision of their own, which can be whole
numbers besides: convolutions of codes (:mod:`robustq.models.integer_convolution`), and float32 for all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robustq.models.instructions import lacks_bfloat16, slows_bfloat16
from robustq.models.tf32 import tf32
from robustq.recipe_faults import BFLOAT16, FLOAT32, INTEGER, PRECISIONS, SAME, SIDE_PRECISIONS, TF32


@contextmanager
def computed_in(model: nn.Module, precision: str, *, side: str = SAME) -> Iterator[None]:
    """Within it every call of ``model`` computes in ``precision``, as does its backward pass, and still answers in
    float32.

    Args:
        model: its weights tell the device.
        precision: one of :data:`robustq.recipe_faults.PRECISIONS`.
        side: of passes on the side, one of :data:`robustq.recipe_faults.SIDE_PRECISIONS`. Where whole numbers are
            asked for, who calls puts their convolutions in place; here it means float32.
    """
    assert precision in PRECISIONS and side in SIDE_PRECISIONS
    halves = (precision == BFLOAT16, (precision if side == SAME else side) == BFLOAT16)
    with tf32(allowed=precision == TF32), _in_bfloat16(model, *halves) if any(halves) else nullcontext():
        yield


def advice(precision: str, device: torch.device, *, key: str = "precision") -> str | None:
    """What is better than a precision that the device has no instructions for; None where it has them, or where
    nothing is known. ``key`` is the recipe's that asks for it.
    """
    if precision == INTEGER and not counts_codes(device):
        return f"torch has no convolutions of whole numbers for this {device}; passes on the side compute in {FLOAT32}"
    if precision == BFLOAT16 and _lacks_bfloat16(device):
        return f"this processor has no instructions for {BFLOAT16}; faster: --set {key}={FLOAT32}"
    if precision == BFLOAT16 and device.type == "cpu" and slows_bfloat16():
        return f"this processor multiplies {BFLOAT16} at half the pace of {FLOAT32}; faster: --set {key}={FLOAT32}"
    # Ampere, compute capability 8.0, was the first.
    if precision == TF32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"only newer GPUs have {TF32}; {device} computes in {FLOAT32}"
    return None


def counts_codes(device: torch.device) -> bool:
    """Whether passes on the side can compute in whole numbers there; that kernel is loaded for it."""
    from robustq.models.integer_convolution import is_available

    return device.type == "cpu" and is_available()


@contextmanager
def _in_bfloat16(model: nn.Module, learning: bool, aside: bool) -> Iterator[None]:
    device = next(model.parameters()).device.type
    inner, own = model.forward, vars(model).get("forward")

    def forward(*inputs: Tensor, **named: Any) -> Any:
        learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters())
        if not (learning if learns else aside):
            return inner(*inputs, **named)
        with torch.autocast(device, dtype=torch.bfloat16):
            return inner(*inputs, **named).float()

    # Around each forward pass alone: a backward pass follows the types that it finds, and what autocast remembers of
    # the weights would be wrong once weight perturbation has moved them.
    model.forward = forward
    try:
        yield
    finally:
        del model.forward  # what the instance had hidden: the method of its class, unless it had one of its own
        if own is not None:
            model.forward = own


def _lacks_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return lacks_bfloat16()
