"""How a method makes its adversarial images: what a crafting pass computes, the BatchNorm mode it runs in, and the
lengths it is given.

The words for the mode are those of ODG-Q's key ``batch_norm``. Published code differs: TRADES and RSLAD craft in eval
mode, the single-step methods in train mode, where the crafting pass moves the running statistics too; which is better
is a matter of tenths (Pang et al., arXiv:2010.00467, section 3.4, finds eval mode slightly ahead).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from robustq.errors import UsageError
from robustq.models.batch_norm import batch_statistics, running_statistics
from robustq.recipe import parse_epsilon
from robustq.recipe_faults import shown, unknown_value

MODES = ("eval", "train", "separate")
"""``eval``: the running statistics, which stay as they are; ``train``: those of the crafted batch, which move the
running ones; ``separate``: those of the crafted batch, which move nothing."""

AUTO = "auto"
"""A step of min(1, 2.5 / steps) epsilon."""


@contextmanager
def crafting(model: nn.Module, mode: str) -> Iterator[None]:
    """Within it ``model`` normalises as ``mode`` says, and nothing but its input gets a gradient.

    Args:
        model: in train mode, which is what the mode ``train`` means.
        mode: one of :data:`MODES`.
    """
    with normalised(model, mode), only_input_gradients(model):
        yield


def normalised(model: nn.Module, mode: str) -> AbstractContextManager[None]:
    """Within it ``model`` normalises as ``mode`` (one of :data:`MODES`) says; ``train`` expects it in train mode."""
    if mode == "eval":
        return running_statistics(model)
    return batch_statistics(model) if mode == "separate" else nullcontext()


@contextmanager
def only_input_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no weight asks for a gradient: a pass for the input's costs no sum over activations and keeps none of
    them for the weights' sake.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def mode_faults(key: str, mode: str) -> list[str]:
    """What is wrong with a BatchNorm mode, in words: nothing, or one fault."""
    return [] if mode in MODES else [unknown_value(key, mode, MODES)]


def step_length(step_size: str | float, *, epsilon: float, steps: int) -> float:
    """A step in the unit of the images.

    Args:
        step_size: :data:`AUTO`, or the length itself as :func:`length` takes it. 2.5 epsilon / steps lets the steps
            reach the other side of the ball (arXiv:1706.06083, section 5); it is 2/255 for ten steps at 8/255, as is
            usual. For fewer than three steps it would exceed the ball and is epsilon.
        epsilon: radius.
        steps: how many.
    """
    return min(1.0, 2.5 / steps) * epsilon if step_size == AUTO else length(step_size)


def length(value: str | float) -> float:
    """A length in [0, 1] from a number or from text such as ``2/255``.

    Raises:
        UsageError: it is neither.
    """
    return parse_epsilon(value)


def length_faults(key: str, value: str | float, *, words: tuple[str, ...] = (), least: float = 0.0) -> list[str]:
    """What is wrong with a length of a method's table, in words: nothing, or one fault.

    Args:
        key, value: as in the recipe, the table's name included.
        words: what may stand in place of a length.
        least: the smallest one; 0 itself is refused.
    """
    if value in words:
        return []
    named = "".join(f"'{word}' or " for word in words)
    try:
        found = length(value)
    except UsageError:
        return [f"{key} = {shown(value)} is not {named}a number from 0 to 1, such as 2/255"]
    # What float32 images cannot tell from the least length is that length.
    if found == 0.0 or found < least - 1e-7:
        wanted = f"at least {round(least * 255)}/255" if least else "over 0"
        return [f"{key} = {shown(value)} must be {named}{wanted}"]
    return []
