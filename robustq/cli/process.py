"""The process of the command line: Ctrl-C, how much is printed, threads and memory.

A library may not decide threads and memory for the program that imports it: ``import robustq`` leaves both alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer

from robustq import progress
from robustq.errors import RobustqWarning, UsageError, printable


@contextmanager
def recorded_interrupts(seen: list[int]) -> Iterator[None]:
    """Append to ``seen`` when Ctrl-C raises KeyboardInterrupt within the block.

    A library may swallow it: torch, interrupted while it is imported, fails later with an AttributeError.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before: Any = None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a caller's own handler stays
        with suppress(ValueError):  # only the main thread receives signals
            before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


LIBRARY_LOGGERS = ("torch.utils.cpp_extension", "torch.onnx", "onnxscript")

_typed: set[str] = set()


def reset_printing() -> None:
    """Forget the options of an earlier call in this process."""
    _typed.clear()


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return "--verbose" in _typed


def _remember(option: str) -> Callable[[bool], None]:
    """A callback: both options are taken before and after the command."""

    def callback(given: bool) -> None:
        if given:
            _typed.add(option)
        if len(_typed) > 1:
            raise UsageError("--quiet and --verbose exclude each other; give one of them")

    return callback


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings and the result only.", callback=_remember("--quiet"))
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also print all settings, library warnings and tracebacks.",
        callback=_remember("--verbose"),
    ),
]


@contextmanager
def console_output() -> Iterator[None]:
    """Show progress and warnings within the block as --quiet and --verbose say."""
    loggers = [logging.getLogger(name) for name in LIBRARY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        if is_verbose():
            warnings.simplefilter("default")
        else:
            # Warnings of Brevitas, exporters and onnxruntime concern no user.
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
        warnings.filterwarnings("always", category=RobustqWarning)

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
            if issubclass(category, RobustqWarning):
                print(f"robustq: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
            else:
                print(warnings.formatwarning(message, category, filename, lineno).rstrip(), file=sys.stderr, flush=True)

        warnings.showwarning = show  # type: ignore[assignment]
        progress.show("--quiet" not in _typed, details=is_verbose())
        try:
            yield
        finally:
            progress.show(False)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from glibc's malloc.h
_MMAP_THRESHOLD = 32 * 1024 * 1024  # the largest that glibc accepts on 64-bit machines
_NEVER_TRIM = 2**31 - 1

_SPIN_COUNT = 2000
"""Turns of libgomp's waiting loop before a thread sleeps, about 20 microseconds:
`python -m benchmarks.waiting_threads`, docs/results/training-cost.md.
"""


def prepare() -> None:
    """Set how long waiting threads spin and how freed memory is reused, unless the environment sets it.

    Call it before torch is loaded.
    """
    # Waking threads for each of a step's thousand operations is slow; threads that spin for long take the core from
    # other processes, which makes a step four times as long.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for OpenMP libraries other than libgomp
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    # Torch then asks for pages of 2 MB for large tensors.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory: a training step frees and allocates the same gigabyte each time, and new memory
    costs a page fault per 4 KB (docs/results/training-cost.md).

    Returns whether it was set: not without glibc, nor where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is set.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
