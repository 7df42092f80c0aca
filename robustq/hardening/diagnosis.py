"""Why a run fails: NaN and Inf, traced to the first layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Batch

INPUT = "the network's input"
"""Listed among the layers if the images that the method generated are not finite."""


class FiniteCheck:
    """Whether all losses and images so far were finite, as one boolean on the batches' device."""

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, images: Tensor, loss: Tensor) -> None:
        """Add one batch; the host does not wait."""
        self._finite = self._finite & images.isfinite().all() & loss.detach().isfinite().all()

    def is_finite(self, model: nn.Module) -> bool:
        """Whether all batches, and the weights and running statistics of ``model`` now, are finite; the host waits."""
        tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
        return bool(torch.stack([self._finite, *(value.isfinite().all() for value in tensors)]).all())


@contextlib.contextmanager
def nonfinite_layers(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the layers whose output is NaN or Inf (and :data:`INPUT`), in the order of computation.

    The host waits for every output: for repeating a failed step, not for training.
    """
    found: list[str] = []

    def check(name: str, *called: Any) -> None:
        if not _all_finite(called[-1]):  # the output, or the inputs before the call
            found.append(name)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(partial(check, INPUT)))
        for name, layer in _layers(model):
            hooks.enter_context(layer.register_forward_hook(partial(check, name)))
        yield found


def find_nonfinite(
    model: nn.Module,
    batches: Iterable[Batch],
    take_step: Callable[[Batch], Tensor],
    *,
    epoch: int,
    first: int,
    last: int,
) -> str:
    """Repeat steps and check every tensor, up to the first step with NaN or Inf.

    Args:
        model: the network that ``take_step`` trains, in its state before the first step.
        take_step: trains on a batch and returns the loss.
        epoch, first, last: numbers of the epoch and of the first and last step, counted from 1, for the message.

    Returns:
        What became NaN or Inf, where and when, as the beginning of a sentence.
    """
    for number, batch in zip(range(first, last + 1), batches, strict=False):
        with nonfinite_layers(model) as layers:
            loss = take_step(batch).item()
        step = f"step {number:,} of epoch {epoch}"
        if not _all_finite(batch.x):
            return f"an image of {step} is NaN or Inf"
        if layers:
            what = "the adversarial images" if layers[0] == INPUT else f"the output of {layers[0]}"
            return f"{what} became NaN or Inf in {step} (loss {loss:g}); everything before it was finite"
        if not math.isfinite(loss):
            return f"the loss became {loss:g} in {step}; every layer's output was finite"
        tensor = next((name for name, value in model.state_dict().items() if not _all_finite(value)), None)
        if tensor is not None:
            return f"{tensor} became NaN or Inf in the update of {step} (loss {loss:g})"
    return f"loss or weights became NaN or Inf between steps {first:,} and {last:,} of epoch {epoch}, not when repeated"


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The leaves of a network; a Brevitas layer counts as one, with its quantizers."""
    children = list(module.named_children())
    if not children or type(module).__module__.startswith("brevitas.nn"):
        yield name or type(module).__name__, module
        return
    for child, part in children:
        yield from _layers(part, f"{name}.{child}" if name else child)


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, tuple | list) or all(_all_finite(part) for part in value)
