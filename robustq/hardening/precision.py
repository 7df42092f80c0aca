"""Precision of the passes: autocast, TF32, torch.compile.

Whether a GPU may round what float32 convolutions and matrix products multiply to TF32.

TF32 keeps 10 of float32's 23 bits behind the point. torch allows it for convolutions unless it is told otherwise
(``torch.backends.cudnn.allow_tf32``), so that a quantizer behind one would meet other values, and answer with other
codes, than on a CPU or on the device that runs the exported file. On a CPU these flags change nothing.

A network's forward pass, and the backward pass through it, as torch.compile makes them, within training steps alone.

Whatever is judged runs as it is written: the monitor, every answer that an attack is counted by, every file.

The numbers that a training step computes in: float32, or what is faster where the arithmetic is.

In bfloat16 convolutions and linear layers take and give numbers of 8 bits' precision and float32's range (mixed
precision after arXiv:1710.03740, whose loss scaling such a range needs not; torch.autocast decides which layers). In
TF32 a GPU rounds what they multiply to 11 bits and takes and gives float32. What must be exact stays in float32:
weights, the optimiser, the quantizers' arithmetic, BatchNorm's statistics, logits, features and losses. Whatever is
judged is judged in float32: the monitor, every attack, every file.

Passes on the side are those in which no weight asks for a gradient: they craft images, of whose gradient a method
mostly takes the signs, or give features to compare with. They may have a precision of their own, which can be whole
numbers besides: convolutions of codes (:mod:`robustq.models.quant.integer_convolution`), and float32 for all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robustq.models.compiled import compile_forward, compiler_errors
from robustq.models.quant.integer_convolution import lacks_bfloat16, slows_bfloat16
from robustq.recipe.schema import BFLOAT16, FLOAT32, INTEGER, PRECISIONS, SAME, SIDE_PRECISIONS, TF32


def forbid_tf32() -> None:
    """Compute float32 in float32 on every GPU of this process from now on."""
    _allow(convolutions=False, products=False)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Within it convolutions and matrix products may round to TF32, or may not; then what was true before is again."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow(convolutions=allowed, products=allowed)
    try:
        yield
    finally:
        _allow(convolutions=convolutions, products=products)


def _allow(*, convolutions: bool, products: bool) -> None:
    # Not by the newer fp32_precision: whoever reads these flags afterwards, torch itself included, would get an error.
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


WORTH_COMPILING = 1800.0
"""Seconds of a run on a CPU of which compiling would be a tenth at most, and save a fifth where it was measured."""


class CompiledForward:
    """The compiled forward pass of one network.

    It is compiled anew for every way in which a method calls the network (crafting, clean features, weights), which
    takes a minute or more each; batches of one length only, since a short last batch is not worth that.

    Args:
        model: on its device; its modules must stay the same objects.
        batch_size: images of the batches that are compiled for.
        cuda_graphs: on a GPU, record the kernels of a pass once and replay them together.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, *, batch_size: int, cuda_graphs: bool, backend: Any = "inductor") -> None:
        self._model = model
        self._batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self._forward = compile_forward(model.forward, dynamic=False, cuda_graphs=cuda_graphs, backend=backend)

    @contextmanager
    def in_place(self, images: int) -> Iterator[None]:
        """Within it every call of the network is the compiled one, if a step's batch has as many images as are compiled
        for; otherwise nothing is touched.

        Raises:
            UsageError: torch.compile does not work on this machine.
        """
        if images != self._batch_size:
            yield
            return
        if self._cuda_graphs:
            # What a step's first passes gave may be read until the next step begins, and not after.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        own = vars(self._model).get("forward")
        self._model.forward = self._forward
        try:
            with compiler_errors(advice="train without it: --no-compile"):
                yield
        finally:
            del self._model.forward  # what the instance had hidden: the method of its class, or one of its own
            if own is not None:
                self._model.forward = own


def compile_advice(device: torch.device, *, cuda_graphs: bool) -> list[str]:
    """What a person should know who compiles for ``device``: one line each."""
    if device.type == "cuda":
        return ["the first step of each kind compiles, which takes a minute or more"]
    lines = ["the first step of each kind compiles, which takes a minute or so each; a step was a fifth shorter then"]
    return [*lines, f"{device} has no CUDA graphs; cuda_graphs has no effect"] if cuda_graphs else lines


def compiling_pays(device: torch.device, *, seconds: float) -> bool:
    """Whether a run of ``seconds`` would gain more than the wait; not where nothing is known, as of GPUs."""
    return device.type == "cpu" and seconds >= WORTH_COMPILING


def better_compiled(*, integers: bool) -> str:
    """What a person should know whose run would gain; ``integers``: whether its passes on the side could compute in
    whole numbers besides, and do not.
    """
    share, aside = ("third", f" --set side_precision={INTEGER}") if integers else ("fifth", "")
    return f"so long a run may be a {share} shorter with --compile{aside}, which takes a C++ compiler and some minutes"


@contextmanager
def computed_in(model: nn.Module, precision: str, *, side: str = SAME) -> Iterator[None]:
    """Within it every call of ``model`` computes in ``precision``, as does its backward pass, and still answers in
    float32.

    Args:
        model: its weights tell the device.
        precision: one of :data:`robustq.recipe.schema.PRECISIONS`.
        side: of passes on the side, one of :data:`robustq.recipe.schema.SIDE_PRECISIONS`. Where whole numbers are
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
    from robustq.models.quant.integer_convolution import is_available

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
