"""The process: signals, terminal output, memory.

Ctrl-C that a library swallows is remembered, so that what then breaks is not taken for a fault of robustq.

How much is told beside the result: --quiet, --verbose, and which warnings reach the user.

Both options stand on the program and on every command, so that they are taken wherever they are typed.

What the command line asks of its own process, before the heavy libraries are loaded: threads and memory.

A library may not decide this for the program that imports it, so that ``import robustq`` leaves both alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Annotated, Any, Self

import typer

from robustq import progress
from robustq.errors import RobustqWarning, UsageError


class Interrupts:
    """``with Interrupts() as interrupts:`` raises KeyboardInterrupt as Python does, and knows afterwards that it did.

    torch, cut off in the middle of its imports, goes on with half a module and fails later with an AttributeError.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # Anything else than Python's own handler (ignored, a caller's, another thread's) is left in place.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                self._before = signal.signal(signal.SIGINT, self._handle)
            except ValueError:  # not the main thread, which alone gets signals
                self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


LIBRARY_LOGGERS = ("torch.utils.cpp_extension", "torch.onnx", "onnxscript")

_typed: set[str] = set()


def start() -> None:
    """Forget what an earlier call in this process was told."""
    _typed.clear()


def is_verbose() -> bool:
    """Whether --verbose was typed."""
    return "--verbose" in _typed


def _be_quiet(wanted: bool) -> None:
    _take("--quiet", wanted)


def _be_verbose(wanted: bool) -> None:
    _take("--verbose", wanted)


def _take(option: str, wanted: bool) -> None:
    if wanted:
        _typed.add(option)
    if len(_typed) > 1:
        raise UsageError("--quiet and --verbose exclude each other; give one of them")


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no notes: warnings and the result only.", callback=_be_quiet),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also tell the settings as resolved, the warnings of libraries, and tracebacks of errors.",
        callback=_be_verbose,
    ),
]


@contextmanager
def applied() -> Iterator[None]:
    """While the block runs: progress and warnings as asked for."""
    loggers = [logging.getLogger(name) for name in LIBRARY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        if is_verbose():
            warnings.simplefilter("default")
        else:
            # A user can do nothing about what Brevitas, exporters and onnxruntime warn of.
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
        warnings.filterwarnings("always", category=RobustqWarning)

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
            if issubclass(category, RobustqWarning):
                print(f"robustq: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""

_LARGEST_THRESHOLD = 32 * 1024 * 1024
"""glibc refuses more on machines of 64 bits."""

_NEVER = 2**31 - 1


_SPINS = 2000
"""Turns of its waiting loop that a thread of libgomp takes before it sleeps, about 20 microseconds (its source reckons
with 100 turns a microsecond): `python -m benchmarks.waiting_threads`, docs/results/training-cost.md.
"""


def prepare() -> None:
    """Let threads spin a moment before they sleep, and let freed memory be used again, unless the environment says
    otherwise.
    """
    # Threads that sleep at once have to be woken for each of a step's thousand operations; threads that spin for long
    # take the core from whatever else wants it, and a step then takes four times as long.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # to other OpenMP libraries than libgomp
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
    # Torch then asks for pages of 2 MB where a tensor has room for them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Ask glibc not to give freed memory back to the system: a training step frees and takes the same gigabyte each
    time, and taking it anew costs a page fault for every 4 KB of it (docs/results/training-cost.md).

    Returns:
        Whether it was done: not without glibc, nor where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ say how.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
