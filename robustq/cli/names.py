"""Names of suites, formats, data sets and recipes for help and completion, read from the source of the registries."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from importlib.resources import files


def registered(module: str, registry: str) -> dict[str, str]:
    """The keys of the dict literal ``registry`` in a module of robustq, for help and completion, with their summaries.

    The summary is the argument ``summary`` of the entry's constructor, or empty. The source is read and not imported:
    modules with registries load torch, which takes seconds.
    """
    source = files("robustq").joinpath(f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == registry:
            literal = next(part for part in ast.walk(node) if isinstance(part, ast.Dict))
            return {
                ast.literal_eval(key): _summary(entry)
                for key, entry in zip(literal.keys, literal.values, strict=True)
                if key is not None
            }
    raise LookupError(f"{module}.py has no dict {registry}")


def _summary(entry: ast.expr) -> str:
    keywords = {word.arg: word.value for word in entry.keywords} if isinstance(entry, ast.Call) else {}
    return str(ast.literal_eval(keywords["summary"])) if "summary" in keywords else ""


def summaries(entries: Mapping[str, str]) -> str:
    """Entries of a registry for a help text: ``name: summary; name: summary``."""
    return "; ".join(f"{name}: {summary}" for name, summary in entries.items())


ARCHITECTURES = registered("models/spec", "ARCHITECTURES")
FORMATS = registered("export/formats", "FORMATS")
CONSUMERS = registered("export/formats", "CONSUMERS")
RUNTIMES = registered("export/runtimes/registry", "RUNTIMES")
TARGETS = sorted(
    one.name.removesuffix(".toml")
    for one in files("robustq").joinpath("export/targets").iterdir()
    if one.name.endswith(".toml")
)
SUITES = registered("evaluation/suites", "SUITES")
DATA = registered("data/load", "KNOWN")


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completer of fixed names; where none fits, the shell completes file names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def complete_recipe(incomplete: str) -> list[str]:
    """Names of the built-in recipes."""
    from robustq.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe, as --set takes them."""
    from robustq.recipe.schema import KEYS

    return [f"{key}=" for key in KEYS if key.startswith(incomplete) and "=" not in incomplete]
