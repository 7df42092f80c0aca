"""info, recipes and quickstart.

robustq info.

robustq recipes.

robustq quickstart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.options import Device, FileOut, Json, NoDevice, NoSeed, OwnModel, Seed, finish, recipe, shortfalls
from robustq.cli.process import Quiet, Verbose


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
    from robustq.files import check_model_file
    from robustq.report.info import description_lines

    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; give a .pt, an .onnx, an export folder or a run folder")
    if not path.is_dir():
        check_model_file(path)

    def job() -> dict[str, Any]:
        from robustq.workflow.info import describe_file

        return describe_file(path, own_model=own_model)

    finish(job, as_json, description_lines, out=out)


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe. Default: list them all.", autocompletion=recipe)
    ] = None,
    seed: NoSeed = 0,
    device: NoDevice = None,
    out: FileOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the recipes by the paper's tables, or print one with every value resolved, as TOML that --recipe takes."""
    from robustq.recipe.paper import by_table

    def job() -> dict[str, Any]:
        from robustq.recipe import load_recipe, recipe_names

        if name is None:
            known = [load_recipe(one) for one in recipe_names()]
            return {"recipes": [{**one.to_dict(), **one.metadata()} for one in known], "tables": by_table(known)}
        from robustq.hardening.methods.registry import resolved_recipe

        found = load_recipe(name)
        return {"recipes": [{**resolved_recipe(found), **found.metadata()}]}

    def lines(result: dict[str, Any]) -> list[str]:
        from robustq.report.info import list_lines, toml_lines

        return list_lines(**result) if name is None else toml_lines(result["recipes"][0])

    finish(job, as_json, lines, out=out)


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
