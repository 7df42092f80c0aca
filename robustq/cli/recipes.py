"""robustq recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from robustq.cli.finish import finish
from robustq.cli.options import FileOut, Json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe. Default: list them all.")] = None,
    seed: Annotated[int, typer.Option(help="No effect here; taken so that every command takes it.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="No effect here; taken so that every command takes it.")] = None,
    out: FileOut = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""

    def job() -> dict[str, Any]:
        from robustq.recipe import load_recipe, recipe_names

        chosen = recipe_names() if name is None else [name]
        return {"recipes": [load_recipe(one).to_dict() for one in chosen]}

    def lines(result: dict[str, Any]) -> list[str]:
        from robustq.report.text import recipe_lines

        return recipe_lines(result["recipes"], whole=name is not None)

    finish(job, as_json, lines, out=out)
