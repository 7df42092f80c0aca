"""robustq export and robustq recheck."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.options import (
    BATCH_NORM,
    CONSUMERS,
    FORMATS,
    PIXELS,
    BundleOut,
    Data,
    Device,
    Epsilon,
    FileOut,
    Images,
    Json,
    OwnModel,
    Seed,
    SkipBadImages,
    finish,
    one_of,
    radius,
    shortfalls,
)
from robustq.cli.process import Quiet, Verbose


def export(
    model: Annotated[
        Path | None, typer.Argument(help="A .pt that robustq wrote. Default: the last hardened model.")
    ] = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="qonnx (FINN, hls4ml), qcdq (any ONNX runtime), integer (onnxruntime, all layers as integers), packed "
            "(that in the smallest file), float (32-bit networks).",
            autocompletion=one_of(FORMATS),
        ),
    ] = "integer",
    pixels: Annotated[
        str,
        typer.Option(
            "--input",
            help="float (pixel / 255) or uint8 (pixels as the camera gives them; not for qonnx).",
            autocompletion=one_of(PIXELS),
        ),
    ] = "float",
    batch_norm: Annotated[
        str,
        typer.Option(
            help="fold (into weights and biases) or keep (BatchNormalization nodes, in qonnx only).",
            autocompletion=one_of(BATCH_NORM),
        ),
    ] = "fold",
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="finn (default) or hls4ml: the tool that a qonnx file is written for.",
            autocompletion=one_of(CONSUMERS),
        ),
    ] = None,
    epsilon: Epsilon = None,
    images: Images = 1000,
    recheck: Annotated[
        bool, typer.Option("--recheck/--no-recheck", help="Count accuracy under attack of the written file.")
    ] = True,
    data: Data = None,
    own_model: OwnModel = None,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: BundleOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the file the device runs, and check it.

    Same answers as PyTorch, integer layers, accuracy under attack; exits with 1 when one falls short.

    Example: robustq export --format qonnx
    """
    from robustq.files import check_model_file
    from robustq.report.text import export_lines

    if model is not None:
        check_model_file(model)
    wanted_epsilon = radius(epsilon)

    def job() -> dict[str, Any]:
        from robustq.workflow.export import export_model

        return export_model(
            model,
            format_name=format_name,
            pixels=pixels,
            batch_norm=batch_norm,
            consumer=consumer,
            epsilon=wanted_epsilon,
            images=images,
            recheck=recheck,
            data=data,
            own_model=own_model,
            skip_bad_images=skip_bad_images,
            seed=seed,
            device=device,
            out=out,
        )

    finish(job, as_json, export_lines, shortfall=shortfalls)


def recheck(
    bundle: Annotated[Path, typer.Argument(help="Export folder that 'robustq export' wrote.")],
    epsilon: Epsilon = None,
    images: Images = 1000,
    data: Data = None,
    own_model: OwnModel = None,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check an exported file again.

    Same answers as PyTorch, integer layers, accuracy under attack, counted under onnxruntime.
    """
    from robustq.files import check_export_folder
    from robustq.report.text import recheck_lines

    check_export_folder(bundle)
    wanted_epsilon = radius(epsilon)

    def job() -> dict[str, Any]:
        from robustq.workflow.export import recheck_bundle

        return recheck_bundle(
            bundle,
            epsilon=wanted_epsilon,
            images=images,
            data=data,
            own_model=own_model,
            skip_bad_images=skip_bad_images,
            seed=seed,
            device=device,
        )

    finish(job, as_json, recheck_lines, out=out, shortfall=shortfalls)
