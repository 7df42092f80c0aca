"""robustq recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from robustq.cli.completion import recipe
from robustq.cli.finish import finish
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import FileOut, Json, NoDevice, NoSeed


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
    from robustq.recipe_claims import by_table

    def job() -> dict[str, Any]:
        from robustq.recipe import load_recipe, recipe_names

        if name is None:
            known = [load_recipe(one) for one in recipe_names()]
            return {"recipes": [{**one.to_dict(), **one.claims()} for one in known], "tables": by_table(known)}
        from robustq.hardening.methods.registry import resolved_recipe

        found = load_recipe(name)
        return {"recipes": [{**resolved_recipe(found), **found.claims()}]}

    def lines(result: dict[str, Any]) -> list[str]:
        from robustq.report.recipe import list_lines, toml_lines

        return list_lines(**result) if name is None else toml_lines(result["recipes"][0])

    finish(job, as_json, lines, out=out)
