"""Why a run fails: numbers that are not finite, memory.

NaN and Inf while training: noticed without making a GPU wait, then traced to the layer where they first appear.

Out of memory: told apart from other faults, and answered with the batch that fits.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Batch

INPUT = "the network's input"
"""Stands among the broken layers for images that were broken before the first layer: the method made them so."""


class FiniteWatch:
    """Whether all losses and images so far were finite, as one boolean on the device.

    Args:
        device: where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self._fine = torch.ones((), dtype=torch.bool, device=device)

    def add(self, images: Tensor, loss: Tensor) -> None:
        """Look at one batch; the host does not wait for the answer."""
        self._fine = self._fine & images.isfinite().all() & loss.detach().isfinite().all()

    def fine(self, model: nn.Module) -> bool:
        """Whether nothing was NaN or Inf, and no weight or running statistic of ``model`` is now; the host waits."""
        tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
        return bool(torch.stack([self._fine, *(value.isfinite().all() for value in tensors)]).all())


def first_broken_tensor(model: nn.Module) -> str | None:
    """Name of the first weight or running statistic of ``model`` that is NaN or Inf."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return name
    return None


@contextlib.contextmanager
def watching_layers(model: nn.Module) -> Iterator[list[str]]:
    """The names of the layers whose output is NaN or Inf while the block runs (and :data:`INPUT`), in the order of
    computation.

    Every output is looked at on the host: for repeating a step that went wrong, not for training.
    """
    broken: list[str] = []

    def entering(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not all(bool(value.isfinite().all()) for value in _tensors(inputs)):
            broken.append(INPUT)

    handles = [model.register_forward_pre_hook(entering)]
    for name, layer in _layers(model):

        def hook(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if not all(bool(value.isfinite().all()) for value in _tensors(output)):
                broken.append(name)

        handles.append(layer.register_forward_hook(hook))
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def find_fault(
    model: nn.Module,
    batches: Iterable[Batch],
    take_step: Callable[[Batch], Tensor],
    *,
    epoch: int,
    first: int,
    last: int,
) -> str:
    """Take steps, looking at every tensor, up to the one where something is NaN or Inf for the first time.

    Args:
        model: what ``take_step`` trains, in the state before the first step.
        batches: at least as many as there are steps.
        take_step: trains on a batch and returns the loss.
        epoch, first, last: numbers of the epoch and of the first and last step, counted from 1, for the message.

    Returns:
        What went wrong, where and when, as the beginning of a sentence.
    """
    for number, batch in zip(range(first, last + 1), batches, strict=False):
        with watching_layers(model) as broken:
            loss = take_step(batch).item()
        step = f"step {number:,} of epoch {epoch}"
        if not bool(batch.x.isfinite().all()):
            return f"an image of {step} is NaN or Inf"
        if broken:
            what = "the adversarial images" if broken[0] == INPUT else f"the output of {broken[0]}"
            return f"{what} became NaN or Inf in {step} (loss {loss:g}); everything before it was finite"
        if not math.isfinite(loss):
            return f"the loss became {loss:g} in {step}; every layer's output was finite"
        tensor = first_broken_tensor(model)
        if tensor is not None:
            return f"{tensor} became NaN or Inf in the update of {step} (loss {loss:g})"
    return f"loss or weights became NaN or Inf between steps {first:,} and {last:,} of epoch {epoch}, not when repeated"


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers by which people know a network: Brevitas' own are not taken apart into their quantizers."""
    children = list(module.named_children())
    if not children or type(module).__module__.startswith("brevitas.nn"):
        yield name or type(module).__name__, module
        return
    for child, part in children:
        yield from _layers(part, f"{name}.{child}" if name else child)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


_CPU_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    # All that oneDNN says when it gets no memory for a convolution. It may have other reasons; what then follows, a try
    # with smaller batches, tells them apart.
    "could not create a primitive",
    "could not create a memory object",
)
"""How torch's CPU allocator and oneDNN say it: as a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def runs_out(work: Callable[[], object]) -> bool:
    """Do ``work`` and say whether memory ran out; what it had taken is free again afterwards.

    Raises:
        Exception: any other fault of ``work``.
    """
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The traceback holds every frame with its tensors; only after this block are they gone.
    else:
        return False
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def largest_that_fits(work: Callable[[int], object], *, too_large: int, least: int = 1) -> int | None:
    """The largest of too_large / 2, too_large / 4, ... for which ``work`` does not run out of memory, found by trying.

    Returns:
        None when not even ``least`` fits.
    """
    size = too_large // 2
    while size >= least:
        if not runs_out(lambda size=size: work(size)):  # type: ignore[misc]
            return size
        size //= 2
    return None
