"""What every command ends with: run the job with stdout kept clean, print the result, fail when a check fell short."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from robustq.errors import CheckFailedError, RobustqWarning


def radius(text: str | None) -> float | None:
    """An ``--epsilon`` as typed, as a number in [0, 1]; None stays None."""
    from robustq.recipe import parse_epsilon

    return None if text is None else parse_epsilon(text)


def shortfalls(result: dict[str, Any]) -> str | None:
    """What a result says did not hold, in one line; None when all held."""
    return "; ".join(result["shortfalls"]) or None


def finish(
    job: Callable[[], dict[str, Any]],
    as_json: bool,
    lines: Callable[[dict[str, Any]], list[str]],
    *,
    out: Path | None = None,
    shortfall: Callable[[dict[str, Any]], str | None] | None = None,
) -> None:
    """Run ``job`` with stdout kept clean, print its result, and exit with 1 when a check fell short."""
    import contextlib

    from robustq import progress
    from robustq.outputs import check_new, write_text_atomically

    if out is not None:
        check_new(out)
    progress.show(True)
    _settle_libraries()
    # Exporters print to stdout now and then; a JSON document must stand there alone.
    with contextlib.redirect_stdout(sys.stderr):
        result = job()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    _print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))
    fault = shortfall(result) if shortfall is not None else None
    if fault is not None:
        raise CheckFailedError(fault)


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError as error:
        # Whoever read our output has seen enough (robustq recipes | head -1): exit as the shell's own tools do, and
        # keep Python from complaining when it ends. Left to typer, this would be exit 1, a check that fell short.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + 13) from error


def _settle_libraries() -> None:
    """Hide warnings of libraries that a user can do nothing about, and keep their threads from spinning."""
    import logging
    import warnings

    # OpenMP threads that wait by spinning make a step ten times slower as soon as something else uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, RobustqWarning):
            print(f"robustq: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=RobustqWarning)
    warnings.showwarning = show  # type: ignore[assignment]
    for name in ("torch.utils.cpp_extension", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
