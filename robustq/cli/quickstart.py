"""robustq quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.finish import finish, shortfalls
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import Device, Json, Seed


def quickstart(
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all results; must not exist. Default: runs/quickstart.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole job once on the embedded digits.

    Trains a float ResNet-8, hardens it to 4 bits, writes three deploy files, and attacks the deployed one beside its
    undefended twins: about two minutes on a CPU.
    """
    from robustq.report.text import quickstart_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.quickstart import quickstart as run

        return run(seed=seed, device=device, out=out)

    finish(job, as_json, quickstart_lines, shortfall=shortfalls)
