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
from types import MappingProxyType
from typing import Any

from robustq.errors import RecipeError, UsageError

METHODS = ("natural", "odgq", "ptq")
UNDEFENDED = frozenset({"natural", "ptq"})
"""Methods that know of no attack."""

TRAINING_KEYS = (
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "milestones",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "crop_padding",
    "flip",
)
"""Keys without a meaning for ``ptq``, which does not train."""

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
        epochs: passes over the training part; like all of :data:`TRAINING_KEYS`, not for ``ptq``.
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
        values |= {"milestones": list(self.milestones), "settings": dict(self.settings)}
        return {key: value for key, value in values.items() if self.method != "ptq" or key not in TRAINING_KEYS}


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
# Smallest and largest value. The upper ends lie far above any use and below what a computer chokes on.
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "batch_size": (2, 65_536),
    "lr": (0, 100),
    "warmup_epochs": (0, 100_000),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 10),
    "crop_padding": (0, 4096),
    "image_size": (0, 4096),
    "train_images": (0, 1e9),
    "calibration_images": (2, 16_384),
    "monitor_images": (1, 1e9),
}


@dataclass(frozen=True)
class Vocabulary:
    """What the rooms above know, so that a recipe is checked against it in one go.

    Args:
        settings: method -> dataclass of its own table.
        architectures: names.
        bits: widths.
    """

    settings: Mapping[str, type]
    architectures: Sequence[str]
    bits: Sequence[int]


KEYS = tuple(_KINDS)
"""Keys of a recipe, without the methods' own tables."""


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


def check_name(name: str) -> None:
    """Make sure that ``name`` is a recipe's name or a file of TOML, without a look at its keys.

    Raises:
        RecipeError: it is neither.
    """
    _read(name)


def load_recipe(name: str, overrides: Sequence[str] = (), *, vocabulary: Vocabulary | None = None) -> Recipe:
    """The recipe called ``name`` (or the TOML file at that path) with ``key=value`` overrides laid over it.

    Without ``vocabulary`` the method's own table, the architecture and the widths are taken as they stand.

    Raises:
        RecipeError: no such recipe (the nearest is named), broken TOML, an unknown key, a value of the wrong kind or
            range; all faults of one recipe are told at once.
    """
    values = _read(name)
    faults = [fault for fault in (_override(values, override) for override in overrides) if fault is not None]
    faults += _faults(values, vocabulary)
    if faults:
        raise RecipeError(f"{name}: " + "; ".join(faults))
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    if "epsilon" in flat:
        flat["epsilon"] = parse_epsilon(flat["epsilon"])
    flat["milestones"] = tuple(flat.get("milestones", ()))
    return replace(
        Recipe(name=name, method="", epochs=0, batch_size=0, lr=0.0), **flat, settings=tables.get(flat["method"], {})
    )


def check_settings(settings: Mapping[str, Any], kind: type, *, table: str) -> Any:
    """Build the settings dataclass ``kind`` from a method's table.

    Raises:
        RecipeError: a key that ``kind`` does not have (the nearest is named), a value of another type than the
            default's, or one that ``kind`` itself refuses.
    """
    faults = settings_faults(settings, kind, table=table)
    if faults:
        raise RecipeError("; ".join(faults))
    return kind(**settings)


def settings_faults(settings: Mapping[str, Any], kind: type, *, table: str) -> list[str]:
    """What is wrong with a method's table, in words; empty when :func:`check_settings` takes it."""
    known: dict[str, Any] = {entry.name: entry.default for entry in fields(kind)}
    faults = []
    for key, value in settings.items():
        if key not in known:
            faults.append(_unknown(f"{table}.{key}", [f"{table}.{other}" for other in known]))
            continue
        allowed = _allowed_types(known[key])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            faults.append(f"{table}.{key} = {shown(value)} is not {_describe(allowed)}")
    if not faults:
        try:
            kind(**settings)
        except RecipeError as error:
            faults.append(str(error))
    return faults


def unknown_value(key: str, value: object, known: Sequence[Any]) -> str:
    """``key = value is unknown``, with the known ones and the nearest of them."""
    near = difflib.get_close_matches(str(value)[:80], [str(one) for one in known], n=1, cutoff=0.5)
    nearest = f" (nearest: {near[0]})" if near else ""
    return f"{key} = {shown(value)} is unknown; known: {', '.join(map(str, known))}{nearest}"


def shown(value: object) -> str:
    """``repr``, cut short: a recipe may hold a number of a thousand digits."""
    try:
        text = repr(value)
    except ValueError:  # CPython writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    except (ValueError, RecursionError) as error:  # tomllib's own error is a ValueError, a number too long another one
        raise RecipeError(f"{name}: not valid TOML ({' '.join(str(error).split())})") from error


def _override(values: dict[str, Any], text: str) -> str | None:
    """Lay ``key=value`` over ``values``; what is wrong with it, in words, or None."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        return f"--set '{text}' has no value; write --set key=value, e.g. --set epochs=10"
    try:
        parsed = tomllib.loads(f"value = {raw.strip()}")
        value = parsed["value"] if len(parsed) == 1 else raw.strip()
    except (ValueError, RecursionError):
        value = raw.strip()  # a bare word: --set schedule=steps
    table, dot, inner = key.strip().partition(".")
    if dot:
        nested = values.setdefault(table, {})
        if not isinstance(nested, dict):
            return f"--set '{text}': {table} is a value, not a table"
        nested[inner] = value
    else:
        values[table] = value
    return None


def _faults(values: dict[str, Any], vocabulary: Vocabulary | None) -> list[str]:
    """Everything that is wrong with a recipe, in words."""
    faults = []
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    method = flat.get("method")
    for key, value in flat.items():
        if key not in _KINDS:
            faults.append(_unknown(key, [*_KINDS, *METHODS], _inner_keys(method, vocabulary)))
        elif not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and bool not in _KINDS[key]):
            faults.append(f"{key} = {shown(value)} is not {_describe(_KINDS[key])}")
        elif isinstance(value, int | float) and key in _RANGES and not _RANGES[key][0] <= value <= _RANGES[key][1]:
            low, high = _RANGES[key]
            faults.append(
                f"{key} = {shown(value)} must be "
                + (f"at least {low:g}" if not value >= low else f"at most {f'{high:.4f}'.rstrip('0').rstrip('.')}")
            )
    if method == "ptq":
        faults += [
            f"{key} has no meaning for method 'ptq', which does not train; leave it out"
            for key in flat
            if key in TRAINING_KEYS
        ]
    for key in ("method",) if method == "ptq" else ("method", "epochs", "batch_size", "lr"):
        if key not in flat:
            faults.append(f"{key} is missing")
    if isinstance(method, str) and method not in METHODS:
        faults.append(unknown_value("method", method, METHODS))
    if isinstance(flat.get("schedule"), str) and flat["schedule"] not in SCHEDULES:
        faults.append(unknown_value("schedule", flat["schedule"], SCHEDULES))
    milestones = flat.get("milestones", [])
    if isinstance(milestones, list) and not all(type(epoch) is int and epoch > 0 for epoch in milestones):
        faults.append(f"milestones = {shown(milestones)} must be whole numbers of epochs")
    if isinstance(flat.get("epsilon"), int | float | str):
        try:
            parse_epsilon(flat["epsilon"])
        except UsageError as error:
            faults.append(str(error))
    for key in tables:
        if key != method:
            faults.append(f"[{shown(key)[1:-1]}] is not the table of method {shown(method)}; only [{method}] is read")
    return faults + ([] if vocabulary is None else _faults_above(flat, tables.get(str(method), {}), vocabulary))


def _faults_above(flat: dict[str, Any], settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[str]:
    """Values that only the rooms above can judge."""
    faults = []
    method, architecture = flat.get("method"), flat.get("architecture")
    # A colon names a network that is not ours, which nobody knows before it is built.
    if isinstance(architecture, str) and ":" not in architecture and architecture not in vocabulary.architectures:
        faults.append(unknown_value("architecture", architecture, vocabulary.architectures))
    for key in ("weight_bits", "act_bits"):
        if type(flat.get(key)) is int and flat[key] not in vocabulary.bits:
            faults.append(unknown_value(key, flat[key], vocabulary.bits))
    if isinstance(method, str) and method in vocabulary.settings:
        faults += settings_faults(settings, vocabulary.settings[method], table=method)
    return faults


def _inner_keys(method: object, vocabulary: Vocabulary | None) -> dict[str, str]:
    """Bare key -> key with its table, of the method's own settings: who writes domains means odgq.domains."""
    if vocabulary is None or not isinstance(method, str) or method not in vocabulary.settings:
        return {}
    return {entry.name: f"{method}.{entry.name}" for entry in fields(vocabulary.settings[method])}


def _unknown(key: str, known: Sequence[str], inner: Mapping[str, str] = MappingProxyType({})) -> str:
    key = key[:80]
    # The method's own first: among equally near ones the first wins.
    near = difflib.get_close_matches(key, [*inner, *known], n=1, cutoff=0.5)
    return f"unknown key '{key}'" + (f" (nearest: {inner.get(near[0], near[0])})" if near else "")
