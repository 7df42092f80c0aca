"""Out of memory: told apart from other faults, and answered with the batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

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
