"""robustq info, robustq recipes and robustq quickstart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import robustq
from robustq.cli.names import complete_recipe
from robustq.cli.next_step import after_quickstart, with_next
from robustq.cli.options import (
    CustomModel,
    Device,
    Printing,
    Reading,
    Seed,
    failed_checks,
    run_job,
    with_groups,
)


@with_groups
def info(
    *,
    path: Annotated[
        Path,
        typer.Argument(
            help="A .pt, .safetensors or .onnx, an export or run folder, the folder of quickstart or zoo:NAME."
        ),
    ],
    options: Reading,
    custom_model: CustomModel = None,
) -> None:
    """Describe a file: architecture, bits, data, accuracies, flags, hashes.

    Examples:
      robustq info runs/resnet20-w4a4-odgq/best.pt
    """
    from robustq.errors import ModelFileError
    from robustq.files import check_model_file
    from robustq.report.info import description_lines
    from robustq.zoo import model_path

    path = model_path(path)
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; give a .pt, an .onnx, an export folder or a run folder")
    if not path.is_dir():
        check_model_file(path)
    run_job(
        lambda: robustq.describe_file(path, custom_model=custom_model),
        options.as_json,
        description_lines,
        out=options.out,
    )


@with_groups
def zoo(*, options: Reading) -> None:
    """List the networks that come with robustq.

    harden, attack, export and info take zoo:NAME as their model, and attack --replay as adversarial images.

    Examples:
      robustq zoo
      robustq attack zoo:cifar10-resnet20-w4a4 --data cifar10
    """
    from robustq.report.info import zoo_lines
    from robustq.zoo import entries

    run_job(lambda: {"zoo": [entry.card for entry in entries()]}, options.as_json, zoo_lines, out=options.out)


@with_groups
def recipes(
    *,
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print. Default: list all.", autocompletion=complete_recipe)
    ] = None,
    options: Reading,
) -> None:
    """List the recipes, or print one as TOML.

    The printed recipe has every value resolved; --recipe takes it.

    Examples:
      robustq recipes cifar10/resnet20-w4a4-odgq > own.toml
    """
    from robustq.recipe.paper import by_table

    def job() -> Mapping[str, Any]:
        from robustq.recipe import load_recipe, recipe_names

        if name is None:
            known = [load_recipe(one) for one in recipe_names()]
            return {"recipes": [{**one.to_dict(), **one.metadata()} for one in known], "tables": by_table(known)}
        from robustq.hardening.methods.registry import SETTINGS, resolved_recipe
        from robustq.recipe.schema import Vocabulary

        found = load_recipe(name, vocabulary=Vocabulary(SETTINGS))
        return {"recipes": [{**resolved_recipe(found), **found.metadata()}]}

    def lines(result: Mapping[str, Any]) -> list[str]:
        from robustq.report.recipes import list_lines, toml_lines

        return list_lines(**result) if name is None else toml_lines(result["recipes"][0])

    run_job(job, options.as_json, lines, out=options.out)


@with_groups
def quickstart(
    *,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="New folder for all results. Default: runs/quickstart.")] = None,
    printing: Printing,
) -> None:
    """Run the whole job once on the embedded digits: two minutes on a CPU.

    Trains a float ResNet-8, hardens it to 4 bits, writes four deploy files, and attacks two of them and the undefended
    models.

    Examples:
      robustq quickstart
    """
    from robustq.report.text import quickstart_lines

    run_job(
        lambda: robustq.quickstart(seed=seed, device=device, out=out),
        printing.as_json,
        lambda result: with_next(quickstart_lines(result), after_quickstart(result)),
        failure=failed_checks,
    )
