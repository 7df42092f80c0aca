"""robustq info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.finish import finish
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import FileOut, Json, NoDevice, NoSeed, OwnModel


def info(
    path: Annotated[Path, typer.Argument(help="A .pt, an .onnx, an export folder or a run folder.")],
    own_model: OwnModel = None,
    seed: NoSeed = 0,
    device: NoDevice = None,
    out: FileOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a file holds.

    Architecture, bits per layer, data, accuracies, flags and hashes of a model file, an ONNX file, an export folder or
    a run folder.

    Example: robustq info runs/resnet20-w4a4-odgq/best.pt
    """
    from robustq.errors import ModelFileError
    from robustq.inputs import check_model_file
    from robustq.report.description import description_lines

    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; give a .pt, an .onnx, an export folder or a run folder")
    if not path.is_dir():
        check_model_file(path)

    def job() -> dict[str, Any]:
        from robustq.workflow.describing import describe_file

        return describe_file(path, own_model=own_model)

    finish(job, as_json, description_lines, out=out)
