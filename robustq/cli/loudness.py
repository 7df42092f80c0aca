"""How much is told beside the result: --quiet, --verbose, and which warnings reach the user.

Both options stand on the program and on every command, so that they are taken wherever they are typed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from robustq import progress
from robustq.errors import RobustqWarning, UsageError

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
