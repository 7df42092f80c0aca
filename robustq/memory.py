"""Memory that runs out: recognised, freed again, and answered with a size that fits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn, TypeVar

from robustq.errors import OutOfMemoryError, one_line
from robustq.progress import note

T = TypeVar("T")

LONGEST_TRIAL = 1800.0
"""Seconds for one size."""

RESERVE = 32 << 20
"""Bytes of address space that are kept for the search of a smaller size, see :func:`within_memory`."""

_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",  # a library that cannot be loaded
    "can't start new thread",
    "resource temporarily unavailable",  # a thread, in compiled code
    # oneDNN without memory for a convolution. It may have other reasons; trying smaller batches shows them.
    "could not create a primitive",
    "could not create a memory object",
)
"""Parts of the messages of torch's allocators, oneDNN, onnxruntime, the dynamic loader and Python's threads."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory ran out, on any device."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError | OSError) and names_memory(str(error))


def names_memory(message: str) -> bool:
    """Whether the message of a library's exception says that memory ran out."""
    return any(part in message.lower() for part in _MESSAGES)


def caused_by_memory(error: BaseException) -> bool:
    """Whether ``error`` or an exception that led to it means that memory ran out."""
    chain: BaseException | None = error
    while chain is not None:
        if is_out_of_memory(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def out_of_memory(error: BaseException) -> str:
    """The line about an error that :func:`caused_by_memory` knows and no :func:`within_memory` has answered."""
    return f"out of memory ({one_line(error, longest=200)}); free some, or allow this process more (ulimit -v)"


def runs_out_of_memory(work: Callable[[], object]) -> bool:
    """Do ``work``; True if memory ran out, after freeing what it had allocated. Other errors pass through."""
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The traceback keeps every frame's tensors alive until this block ends.
    else:
        return False
    free_memory()
    return True


def fits(work: Callable[[], object]) -> bool:
    """Try whether ``work`` runs within memory; what it changes is lost, or must not be used again.

    Without a GPU a copy of this process tries it: native code that gets no memory may crash, and leaves no address
    space for the next trial.
    """
    if _has_gpu() or not hasattr(os, "fork"):  # CUDA does not work in a copy
        return not runs_out_of_memory(work)
    child = os.fork()
    if child == 0:
        _try_and_exit(work)
    try:
        deadline = time.monotonic() + LONGEST_TRIAL
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                return status == 0
            time.sleep(0.01)
        return False
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _try_and_exit(work: Callable[[], object]) -> NoReturn:
    """In the copy: nothing is printed, and no clean-up of the original runs."""
    status = 1
    with contextlib.suppress(BaseException):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)  # OpenMP's threads do not exist in the copy
        work()
        status = 0
    os._exit(status)


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def free_memory() -> None:
    """Give memory that nothing uses back to the system and to the GPU."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    if _has_gpu():
        sys.modules["torch"].cuda.empty_cache()


def is_limited() -> bool:
    """Whether the address space of this process has a limit (``ulimit -v``)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


@contextlib.contextmanager
def _reserve() -> Iterator[None]:
    """Keep :data:`RESERVE` bytes of address space within the block; they are never touched and take no memory."""
    try:
        kept = mmap.mmap(-1, RESERVE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    except OSError:  # so little is left
        yield
    else:
        with kept:
            yield


def within_memory(work: Callable[[], T], message: Callable[[], str], *, trial: Callable[[], object] | None = None) -> T:
    """The result of ``work``.

    Some address space is free for ``message``, which ``work`` could not take: under a limit of it (``ulimit -v``) the
    allocator keeps what ``work`` has freed, and oneDNN needs new pages for the code of each other batch size.

    Args:
        trial: the part of ``work`` that takes most memory. Under a limit of address space a copy of the process tries
            it first, since oneDNN may crash where it gets no memory.

    Raises:
        OutOfMemoryError: with ``message``, which is asked for once the memory of ``work`` is free again.
    """
    results: list[T] = []
    with _reserve():
        failed = trial is not None and is_limited() and not fits(trial)
        failed = failed or runs_out_of_memory(lambda: results.append(work()))
    if failed:
        raise OutOfMemoryError(message())
    return results[0]


def largest_that_fits(work: Callable[[int], object], *, too_large: int, least: int = 1) -> int | None:
    """The first of too_large / 2, too_large / 4, ... for which ``work`` fits (:func:`fits`); None if not even ``least``
    does.
    """
    size = too_large // 2
    while size >= least:
        if fits(partial(work, size)):
            return size
        size //= 2
    return None


def shrinking(work: Callable[[int], T], size: int) -> T:
    """``work(size)``; where memory runs out, of half the size, and so on: for results that do not depend on the size.

    Raises:
        OutOfMemoryError: not even 1 fits.
    """
    results: list[T] = []

    def attempt(count: int) -> None:
        results.append(work(count))

    while runs_out_of_memory(partial(attempt, size)):
        if size <= 1:
            raise OutOfMemoryError("out of memory, not even one image fits; take a machine with more memory")
        size //= 2
        note(f"note    too little memory for more than {size} images at once")
    return results[0]
