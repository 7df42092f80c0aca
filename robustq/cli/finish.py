"""What every command ends with: run the job with stdout kept clean, print the result, fail when a check fell short."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from robustq.cli.loudness import applied
from robustq.errors import CheckFailedError


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

    from robustq.outputs import check_new, write_text_atomically

    if out is not None:
        check_new(out)
    # Exporters print to stdout now and then; a JSON document must stand there alone.
    with applied(), contextlib.redirect_stdout(sys.stderr):
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
