"""Recipes: every setting of a training run in one small TOML file, checked as a whole before anything starts.

A recipe's name is its path below recipes/ without the ending: ``cifar10/resnet20-w4a4-odgq``. Keys that are absent are
settled by the model, the data set or the command line. The table named like the method (``[odgq]``) holds the method's
own keys, which the method checks itself (:mod:`robustq.hardening`).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from robustq.errors import RecipeError, UsageError

METHODS = ("natural", "odgq")
SCHEDULES = ("cosine", "steps")


def parse_epsilon(value: float | str) -> float:
    """A radius in [0, 1] from a number, ``"8/255"`` or ``"0.03"``.

    Raises:
        UsageError: not a number, NaN, negative, over 1, or a division by zero.
    """
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    advice = "give a number from 0 to 1, such as 8/255 or 0.03"
    if isinstance(value, bool):
        raise UsageError(f"epsilon {shown} is not a number; {advice}")
    try:
        if isinstance(value, str) and "/" in value:
            above, below = value.split("/")
            number = float(above) / float(below)
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"epsilon {shown} is not a number; {advice}") from error
    if not math.isfinite(number) or not 0.0 <= number <= 1.0:
        raise UsageError(f"epsilon {shown} is outside [0, 1] (pixels are divided by 255); {advice}")
    return number


def format_epsilon(epsilon: float) -> str:
    """``8/255`` when the radius is a whole number of grey levels, else the number."""
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 else f"{epsilon:g}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run.

    Args:
        name: path below recipes/, or the file given.
        summary: one sentence for ``robustq recipes``.
        method: one of :data:`METHODS`.
        data, architecture, weight_bits, act_bits: the task and the network; None leaves them to the model or the
            command line.
        epsilon: radius of the threat model in [0, 1]; None: what the model says, else 8/255.
        epochs: passes over the training part.
        batch_size: images a step.
        lr: peak learning rate.
        schedule: ``cosine`` (to 0) or ``steps`` (divided by 10 at each of ``milestones``, in epochs).
        warmup_epochs: epochs of linear warm-up, may be a fraction.
        momentum, weight_decay: of SGD; learned activation thresholds are not decayed.
        crop_padding, flip: augmentation; None: by the data set.
        image_size: side in pixels to which folders of images are resized (0: they all have one square size already).
        train_images: use only so many training images (0: all).
        calibration_images: training images that set the activation scales before the first step.
        monitor_images: held-out images on which clean and PGD-10 accuracy are watched each epoch.
        settings: the method's own table.
    """

    name: str
    summary: str = ""
    method: str
    data: str | None = None
    architecture: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    epsilon: float | None = None
    epochs: int
    batch_size: int
    lr: float
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int | None = None
    flip: bool | None = None
    image_size: int = 0
    train_images: int = 0
    calibration_images: int = 512
    monitor_images: int = 500
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with every value, as kept in a run's config.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, "milestones": list(self.milestones), "settings": dict(self.settings)}


_KINDS: dict[str, tuple[type, ...]] = {
    "summary": (str,),
    "method": (str,),
    "data": (str,),
    "architecture": (str,),
    "weight_bits": (int,),
    "act_bits": (int,),
    "epsilon": (int, float, str),
    "epochs": (int,),
    "batch_size": (int,),
    "lr": (int, float),
    "schedule": (str,),
    "milestones": (list,),
    "warmup_epochs": (int, float),
    "momentum": (int, float),
    "weight_decay": (int, float),
    "crop_padding": (int,),
    "flip": (bool,),
    "image_size": (int,),
    "train_images": (int,),
    "calibration_images": (int,),
    "monitor_images": (int,),
}
_AT_LEAST: dict[str, float] = {
    "epochs": 1,
    "batch_size": 2,
    "lr": 0,
    "warmup_epochs": 0,
    "momentum": 0,
    "weight_decay": 0,
    "crop_padding": 0,
    "image_size": 0,
    "train_images": 0,
    "calibration_images": 2,
    "monitor_images": 1,
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with robustq, sorted."""
    root = resources.files("robustq.recipes")
    found: list[str] = []

    def walk(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                found.append(prefix + entry.name.removesuffix(".toml"))

    walk(root, "")
    return sorted(found)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called ``name`` (or the TOML file at that path) with ``key=value`` overrides laid over it.

    Raises:
        RecipeError: no such recipe (the nearest is named), broken TOML, an unknown key, a value of the wrong kind or
            range; all faults of one recipe are told at once.
    """
    values = _read(name)
    for override in overrides:
        _override(values, override)
    return _checked(name, values)


def check_settings(settings: Mapping[str, Any], kind: type, *, table: str) -> Any:
    """Build the settings dataclass ``kind`` from a method's table.

    Raises:
        RecipeError: a key that ``kind`` does not have (the nearest is named), a value of another type than the
            default's, or one that ``kind`` itself refuses.
    """
    known: dict[str, Any] = {entry.name: entry.default for entry in fields(kind)}
    faults = []
    for key, value in settings.items():
        if key not in known:
            faults.append(_unknown(f"{table}.{key}", [f"{table}.{other}" for other in known]))
            continue
        allowed = _allowed_types(known[key])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            faults.append(f"{table}.{key} = {value!r} is not {_describe(allowed)}")
    if faults:
        raise RecipeError("; ".join(faults))
    return kind(**settings)


def _allowed_types(default: Any) -> tuple[type, ...]:
    if isinstance(default, bool):
        return (bool,)
    if isinstance(default, int | float):
        return (int, float)
    return (str, int, float)


def _describe(types: tuple[type, ...]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}
    if types == (int, float):
        return "a number"
    return " or ".join(names[kind] for kind in types)


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise RecipeError(f"{name}: no such recipe file; give a path to a .toml, or a name from 'robustq recipes'")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: is not UTF-8 text, so not a recipe; give a .toml file") from error
    else:
        entry = resources.files("robustq.recipes").joinpath(*f"{name}.toml".split("/"))
        if name not in recipe_names():
            near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown recipe '{name}' (nearest: {near}); 'robustq recipes' lists them all")
        text = entry.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: not valid TOML ({error})") from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set '{text}' has no value; write --set key=value, e.g. --set epochs=10")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word: --set schedule=steps
    table, dot, inner = key.strip().partition(".")
    if dot:
        nested = values.setdefault(table, {})
        if not isinstance(nested, dict):
            raise RecipeError(f"--set '{text}': {table} is a value, not a table")
        nested[inner] = value
    else:
        values[table] = value


def _checked(name: str, values: dict[str, Any]) -> Recipe:
    faults = []
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    method = flat.get("method")
    for key, value in flat.items():
        if key not in _KINDS:
            faults.append(_unknown(key, [*_KINDS, *METHODS]))
        elif not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and bool not in _KINDS[key]):
            faults.append(f"{key} = {value!r} is not {_describe(_KINDS[key])}")
        elif key in _AT_LEAST and isinstance(value, int | float) and not _AT_LEAST[key] <= value < math.inf:
            faults.append(f"{key} = {value!r} must be at least {_AT_LEAST[key]:g}")
    for key in ("method", "epochs", "batch_size", "lr"):
        if key not in flat:
            faults.append(f"{key} is missing")
    if isinstance(method, str) and method not in METHODS:
        faults.append(f"method = '{method}' is unknown; known: {', '.join(METHODS)}")
    if flat.get("schedule", "cosine") not in SCHEDULES:
        faults.append(f"schedule = {flat['schedule']!r} is unknown; known: {', '.join(SCHEDULES)}")
    milestones = flat.get("milestones", [])
    if isinstance(milestones, list) and not all(type(epoch) is int and epoch > 0 for epoch in milestones):
        faults.append(f"milestones = {milestones!r} must be whole numbers of epochs")
    for key in tables:
        if key != method:
            faults.append(f"[{key}] is not the table of method '{method}'; only [{method}] is read")
    if faults:
        raise RecipeError(f"{name}: " + "; ".join(faults))
    if "epsilon" in flat:
        flat["epsilon"] = parse_epsilon(flat["epsilon"])
    flat["milestones"] = tuple(milestones)
    return replace(
        Recipe(name=name, method="", epochs=1, batch_size=2, lr=0.0), **flat, settings=tables.get(str(method), {})
    )


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key '{key}'" + (f" (nearest: {near[0]})" if near else "")
