"""--resume of train and harden: the folder says everything, so nothing else may be said beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.errors import UsageError
from robustq.recipe import UNDEFENDED

Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_FOLDER",
        help="Go on with a run that was stopped or cut off. Its folder says everything; beside it only --device, "
        "--data (where the same data lies now), --model and --json.",
    ),
]

BESIDE = frozenset({"resume", "data", "device", "own_model", "as_json", "quiet", "verbose"})
"""Parameters that may stand beside --resume."""


def resumed(run: Path, *, data: str | None, device: str | None, own_model: str | None) -> dict[str, Any]:
    """Go on with the run in ``run``; the result is the one of the command that began it."""
    from robustq.workflow.resuming import resume_run

    return resume_run(run, data=data, device=device, own_model=own_model)


def advice(result: dict[str, Any], own_model: str | None) -> str:
    """The command that usually follows a finished run; a user's own network has to be named in it again."""
    name = "" if own_model is None else f" --model {own_model}"
    if "bits" in result:  # harden's; the model that export takes by itself is the last defended one
        model = f"{result['checkpoint']} " if result["method"] in UNDEFENDED else ""
        return f"robustq export {model}--format integer{name}"
    return f"robustq harden {result['checkpoint']} --bits 4{name}"


def check_alone(context: typer.Context) -> None:
    """Refuse what was typed beside --resume and would have no effect.

    Raises:
        UsageError: names it.
    """
    typed = [
        param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
        for param in context.command.params
        if param.name not in BESIDE
        and getattr(context.get_parameter_source(str(param.name)), "name", "") == "COMMANDLINE"
    ]
    if typed:
        raise UsageError(
            f"{', '.join(typed)} beside --resume: the run folder says it already; leave it out, or start a new run"
        )
