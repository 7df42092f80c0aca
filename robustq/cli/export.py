"""robustq export and robustq recheck."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import robustq
from robustq.cli.names import CONSUMERS, FORMATS, SUITES, TARGETS, one_of, summaries
from robustq.cli.next_step import after_export, after_recheck, after_weights, with_next
from robustq.cli.options import (
    FileOut,
    Judging,
    Printing,
    Runtime,
    failed_checks,
    rare,
    run_job,
    typed_options,
    with_groups,
)
from robustq.errors import UsageError

SAFETENSORS = "safetensors"

WITH_SAFETENSORS = frozenset(
    {"model", "format_name", "out", "custom_model", "seed", "device", "as_json", "quiet", "verbose"}
)
"""Parameters that may be given together with --format safetensors."""


DECIDED = frozenset({"format_name", "pixels", "batch_norm", "consumer"})
"""Parameters that a target decides."""


@with_groups
def export(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Argument(help="A .pt or .safetensors of robustq, or zoo:NAME. Default: the last hardened model."),
    ] = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"{summaries(FORMATS)}; {SAFETENSORS}: weights and spec, as a model.pt.",
            autocompletion=one_of(*FORMATS, SAFETENSORS),
        ),
    ] = "integer",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help=f"Decides format and input: {', '.join(TARGETS)}, or a file of your own.",
            autocompletion=one_of(*TARGETS),
        ),
    ] = None,
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
    out: Annotated[
        Path | None, typer.Option(help="New export folder, or .safetensors file. Default: export-out/NAME.")
    ] = None,
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
    max_drift: Annotated[float, rare(help="Share of the answers that rounding may change.", min=0, max=1)] = 0.02,
    targets: Annotated[bool, rare("--targets", help="List the targets, and write nothing.")] = False,
    kit: Annotated[
        bool, rare("--kit/--no-kit", help="Write the folder kit, with which the device checks the file.")
    ] = True,
) -> None:
    """Write the deploy file of a model and check it.

    Checks: same answers as PyTorch, integer layers, accuracy under attack; one that fails: exit 1.

    Examples:
      robustq export --format qonnx
      robustq export --target browser
      robustq export --format safetensors --out weights.safetensors
      robustq export runs/resnet20-w4a4-odgq/best.pt --input uint8
    """
    from robustq.files import check_model_file
    from robustq.report.export import export_lines
    from robustq.zoo import model_path

    if targets:
        from robustq.report.targets import target_lines

        typer.echo("\n".join(target_lines(as_json=printing.as_json)))
        return
    if target is not None:
        typed = typed_options(context, but=frozenset({*context.params} - DECIDED))
        if typed:
            raise UsageError(f"--target {target} decides format and input; leave {', '.join(typed)} out")
    if model is not None:
        model = check_model_file(model_path(model))
    if format_name == SAFETENSORS:
        _export_weights(context, model, options, out, as_json=printing.as_json)
        return
    keywords = options.keywords()
    keywords |= {"format_name": format_name, "pixels": pixels, "batch_norm": batch_norm, "consumer": consumer}
    run_job(
        lambda: robustq.export_model(
            model, recheck=recheck, max_drift=max_drift, kit=kit, target=target, out=out, **keywords
        ),
        printing.as_json,
        lambda result: with_next(export_lines(result), after_export(result, options)),
        failure=failed_checks,
    )


def _export_weights(
    context: typer.Context, model: Path | None, options: Judging, out: Path | None, *, as_json: bool
) -> None:
    from robustq.report.export import weights_lines

    typed = typed_options(context, but=WITH_SAFETENSORS)
    if typed:
        raise UsageError(f"{', '.join(typed)} has no effect with --format {SAFETENSORS}; leave it out")
    own = options.custom_model
    run_job(
        lambda: robustq.export_weights(model, custom_model=own, out=out),
        as_json,
        lambda result: with_next(weights_lines(result), after_weights(Path(result["file"]), custom_model=own)),
    )


@with_groups
def recheck(
    *,
    bundle: Annotated[Path, typer.Argument(help="Export folder of 'robustq export', with or without its model.pt.")],
    options: Judging,
    runtime: Runtime = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Attack the file by this suite, such as standard, and model.pt in PyTorch beside it.",
            autocompletion=one_of(*SUITES),
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER.json", help="Say what differs from another result (--out), of another machine, say."
        ),
    ] = None,
    out: FileOut = None,
    printing: Printing,
) -> None:
    """Check an exported file again under onnxruntime, or in the --runtime.

    Checks: same answers as PyTorch, integer layers, accuracy under attack with the gradients of model.pt and with those
    of the file alone; with --suite, accuracy of model.pt in PyTorch beside it. Exits with 1 when a check fails.

    Examples:
      robustq recheck export-out/resnet20-w4a4-odgq-integer
      robustq recheck export-out/resnet20-w4a4-odgq-packed --suite standard --runtime openvino-f32
      robustq recheck export-out/resnet20-w4a4-odgq-packed --compare of-the-board.json
    """
    from robustq.files import check_export_folder
    from robustq.report.export import recheck_lines

    check_export_folder(bundle)
    keywords = options.keywords()
    run_job(
        lambda: robustq.recheck_bundle(bundle, runtime=runtime, suite=suite, compare=compare, **keywords),
        printing.as_json,
        lambda result: with_next(recheck_lines(result), after_recheck(result, options)),
        out=out,
        failure=failed_checks,
    )
