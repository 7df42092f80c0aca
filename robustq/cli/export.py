"""robustq export and robustq recheck."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import robustq
from robustq.cli.names import CONSUMERS, FORMATS, one_of, summaries
from robustq.cli.options import (
    FileOut,
    Judging,
    Printing,
    failed_checks,
    rare,
    run_job,
    with_groups,
)


@with_groups
def export(
    *,
    model: Annotated[
        Path | None, typer.Argument(help="A .pt of robustq, or zoo:NAME. Default: the last hardened model.")
    ] = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"{summaries(FORMATS)}.",
            autocompletion=one_of(*FORMATS),
        ),
    ] = "integer",
    pixels: Annotated[
        str,
        typer.Option(
            "--input",
            help="float (pixel / 255) or uint8 (raw pixels; not for qonnx).",
            autocompletion=one_of("float", "uint8"),
        ),
    ] = "float",
    recheck: Annotated[
        bool, typer.Option("--recheck/--no-recheck", help="Count accuracy under attack on the written file.")
    ] = True,
    options: Judging,
    out: Annotated[Path | None, typer.Option(help="New export folder. Default: export-out/NAME.")] = None,
    printing: Printing,
    batch_norm: Annotated[
        str, rare(help="fold, or keep (BatchNormalization nodes; qonnx only).", autocompletion=one_of("fold", "keep"))
    ] = "fold",
    consumer: Annotated[
        str | None,
        rare(
            "--for",
            help=f"Tool that reads the qonnx file: {' or '.join(CONSUMERS)}. Default: {next(iter(CONSUMERS))}.",
            autocompletion=one_of(*CONSUMERS),
        ),
    ] = None,
    max_drift: Annotated[
        float, rare(help="Share of the answers that folding BatchNorm may change.", min=0, max=1)
    ] = 0.02,
    kit: Annotated[
        bool, rare("--kit/--no-kit", help="Write the folder kit, with which the device checks the file.")
    ] = True,
) -> None:
    """Write the deploy file of a model and check it.

    Checks: same answers as PyTorch, integer layers, accuracy under attack. Exits with 1 when a check fails.

    Examples:
      robustq export --format qonnx
      robustq export runs/resnet20-w4a4-odgq/best.pt --input uint8
    """
    from robustq.files import check_model_file
    from robustq.report.text import export_lines
    from robustq.zoo import model_path

    if model is not None:
        model = check_model_file(model_path(model))
    keywords = options.keywords()
    keywords |= {"format_name": format_name, "pixels": pixels, "batch_norm": batch_norm, "consumer": consumer}
    run_job(
        lambda: robustq.export_model(model, recheck=recheck, max_drift=max_drift, kit=kit, out=out, **keywords),
        printing.as_json,
        export_lines,
        failure=failed_checks,
    )


@with_groups
def recheck(
    *,
    bundle: Annotated[Path, typer.Argument(help="Export folder of 'robustq export', with or without its model.pt.")],
    options: Judging,
    out: FileOut = None,
    printing: Printing,
) -> None:
    """Check an exported file again under onnxruntime.

    Checks: same answers as PyTorch, integer layers, accuracy under attack with the gradients of model.pt and with those
    of the file alone. Exits with 1 when a check fails.

    Examples:
      robustq recheck export-out/resnet20-w4a4-odgq-integer
    """
    from robustq.files import check_export_folder
    from robustq.report.text import recheck_lines

    check_export_folder(bundle)
    keywords = options.keywords()
    run_job(
        lambda: robustq.recheck_bundle(bundle, **keywords),
        printing.as_json,
        recheck_lines,
        out=out,
        failure=failed_checks,
    )
