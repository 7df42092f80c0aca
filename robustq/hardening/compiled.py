"""A network's forward pass, and the backward pass through it, as torch.compile makes them, within training steps alone.

Whatever is judged runs as it is written: the monitor, every answer that an attack is counted by, every file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from robustq.models.compiled import compile_forward, in_one_line
from robustq.recipe_faults import INTEGER

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
            with in_one_line(instead="train without it: --no-compile"):
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
