"""A network's forward pass, and the backward pass through it, as torch.compile makes them, within training steps alone.

Whatever is judged runs as it is written: the monitor, every attack, every file. Quantizers keep their values: a GPU's
compiled division is approximate by default, which would turn a rounding here and there, and is asked to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from robustq.errors import UsageError
from robustq.recipe_faults import INTEGER

_OPTIONS = {"eager_numerics.division_rounding": True}

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
        options: dict[str, Any] | None = None
        if backend == "inductor":
            options = {**_OPTIONS, "triton.cudagraphs": cuda_graphs}
        self._forward = torch.compile(_of_its_own(model.forward), backend=backend, dynamic=False, options=options)

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
        # Only here: loading the compiler takes seconds.
        from torch._dynamo.exc import TorchDynamoException

        if self._cuda_graphs:
            # What a step's first passes gave may be read until the next step begins, and not after.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        own = vars(self._model).get("forward")
        self._model.forward = self._forward
        try:
            yield
        except TorchDynamoException as error:
            raise UsageError(
                f"torch.compile does not work here ({_first_line(error)}); train without it: --no-compile"
            ) from error
        finally:
            del self._model.forward  # what the instance had hidden: the method of its class, or one of its own
            if own is not None:
                self._model.forward = own


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code that no other network has.

    torch.compile keeps what it has compiled by code, and takes it for another network of the same class whatever hooks
    that one has: the features of ODG-Q would be missed.
    """

    def own(*inputs: Any, **named: Any) -> Any:
        return forward(*inputs, **named)

    own.__code__ = own.__code__.replace()
    return own


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


def _first_line(error: Exception) -> str:
    cause: BaseException = getattr(error, "inner_exception", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0].rstrip(".")
