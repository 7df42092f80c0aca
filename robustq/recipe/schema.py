"""The recipe's keys, their types, ranges and choices.

What can be wrong with a recipe: keys and values that nothing reads, told in words and all at once.

What a recipe claims of itself, which decides nothing of the run: rows of the paper's tables, and its evidence.

Evidence is absent until it exists: a recipe without figures has not been run at full size yet, whatever it promises.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol

from robustq.errors import RecipeError

METHODS = ("natural", "odgq", "pgd", "free", "dq", "fgsm-rs", "n-fgsm", "fgsm-mep", "trades", "rslad", "ptq")
TRAINING_KEYS = (
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "milestones",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "clip_gradient",
    "ema_decay",
    "awp_gamma",
    "awp_warmup_epochs",
    "precision",
    "side_precision",
    "compile",
    "cuda_graphs",
    "crop_padding",
    "flip",
    "stop_on_collapse",
    "tensorboard",
)
"""Keys without a meaning for ``ptq``, which does not train."""

SCHEDULES = ("cosine", "steps")

FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
PRECISIONS = (FLOAT32, TF32, BFLOAT16)
"""What a training step may compute in (:mod:`robustq.hardening.precision`)."""

SAME, INTEGER = "same", "integer"
SIDE_PRECISIONS = (SAME, FLOAT32, BFLOAT16, INTEGER)
"""What its passes on the side may; whether a GPU rounds to TF32 is one setting of a whole step."""

_KINDS: dict[str, tuple[type, ...]] = {
    "summary": (str,),
    "method": (str,),
    "data": (str,),
    "architecture": (str,),
    "weight_bits": (int,),
    "act_bits": (int,),
    "shared_sum_scale": (bool,),
    "epsilon": (int, float, str),
    "epochs": (int,),
    "batch_size": (int,),
    "lr": (int, float),
    "schedule": (str,),
    "milestones": (list,),
    "warmup_epochs": (int, float),
    "momentum": (int, float),
    "weight_decay": (int, float),
    "label_smoothing": (int, float),
    "clip_gradient": (int, float),
    "ema_decay": (int, float),
    "awp_gamma": (int, float),
    "awp_warmup_epochs": (int,),
    "precision": (str,),
    "side_precision": (str,),
    "compile": (bool,),
    "cuda_graphs": (bool,),
    "crop_padding": (int,),
    "flip": (bool,),
    "image_size": (int,),
    "train_images": (int,),
    "calibration_images": (int,),
    "monitor_images": (int,),
    "stop_on_collapse": (bool,),
    "tensorboard": (bool,),
}
# Smallest and largest value. The upper ends lie far above any use and below what a computer chokes on.
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "batch_size": (2, 65_536),
    "lr": (0, 100),
    "warmup_epochs": (0, 100_000),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 10),
    "label_smoothing": (0, 0.9999),
    "clip_gradient": (0, 1e6),
    "ema_decay": (0, 0.9999),
    "awp_gamma": (0, 1),
    "awp_warmup_epochs": (0, 100_000),
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


def check_settings(settings: Mapping[str, Any], kind: type, *, table: str) -> Any:
    """Build the settings dataclass ``kind`` from a method's table.

    Raises:
        RecipeError: a key that ``kind`` does not have (the nearest is named), a value of another type than the
            default's, or one that ``kind`` itself refuses.
    """
    faults = settings_errors(settings, kind, table=table)
    if faults:
        raise RecipeError("; ".join(faults))
    return kind(**settings)


def settings_errors(settings: Mapping[str, Any], kind: type, *, table: str) -> list[str]:
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


def number_errors(
    key: str, value: float, *, low: float, high: float, whole: bool = False, above: bool = False
) -> list[str]:
    """What is wrong with a number of a method's table, in words: nothing, or one fault.

    Args:
        key, value: as in the recipe, the table's name included.
        low, high: smallest and largest value.
        whole: no fractions.
        above: ``low`` itself is too small.
    """
    if (low < value if above else low <= value) and value <= high and not (whole and value != int(value)):
        return []
    kind = "a whole number" if whole else "a number"
    span = f"over {low:g} and at most {high:.9g}" if above else f"from {low:g} to {high:.9g}"
    return [f"{key} = {shown(value)} must be {kind} {span}"]


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


def find_faults(values: dict[str, Any], vocabulary: Vocabulary | None) -> list[str]:
    """Everything that is wrong with a recipe but for its epsilon, in words."""
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
    if method == "rslad" and flat.get("label_smoothing"):
        faults.append("label_smoothing has no meaning for method 'rslad', which reads no labels; leave it out")
    for key in ("method",) if method == "ptq" else ("method", "epochs", "batch_size", "lr"):
        if key not in flat:
            faults.append(f"{key} is missing")
    if isinstance(method, str) and method not in METHODS:
        faults.append(unknown_value("method", method, METHODS))
    if isinstance(flat.get("schedule"), str) and flat["schedule"] not in SCHEDULES:
        faults.append(unknown_value("schedule", flat["schedule"], SCHEDULES))
    if isinstance(flat.get("precision"), str) and flat["precision"] not in PRECISIONS:
        faults.append(unknown_value("precision", flat["precision"], PRECISIONS))
    if isinstance(flat.get("side_precision"), str) and flat["side_precision"] not in SIDE_PRECISIONS:
        faults.append(unknown_value("side_precision", flat["side_precision"], SIDE_PRECISIONS))
    if flat.get("cuda_graphs") is True and flat.get("compile") is not True:
        faults.append("cuda_graphs needs compile = true, whose passes it records")
    milestones = flat.get("milestones", [])
    if isinstance(milestones, list) and not all(type(epoch) is int and epoch > 0 for epoch in milestones):
        faults.append(f"milestones = {shown(milestones)} must be whole numbers of epochs")
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
        faults += settings_errors(settings, vocabulary.settings[method], table=method)
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


PAPER_TABLES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "I": ("CIFAR-10, ResNet-20 at 4 bits", 11),
        "II": ("MNIST, ResNet-20 at 4 bits", 11),
        "III": ("ImageNet, ResNet-18 at 4 bits and 1 bit", 10),
        "IV": ("ablations of ODG-Q: CIFAR-10, ResNet-20 at 4 bits", 5),
        "V": ("bit widths: CIFAR-10, ResNet-20 at 32, 8, 4, 3, 2 and 1 bit", 12),
    }
)
"""Tables of arXiv:2210.08701 -> what they show, and their rows. The last row of IV is ours: the paper lacks it."""

EVIDENCE: Mapping[str, str] = MappingProxyType(
    {
        "command": "the command that made the figures, as typed",
        "seed": "its seed, or a list of them where figures are means over seeds",
        "hardware": "what it ran on",
        "figures": "numbers by name; accuracies as fractions",
    }
)
"""Keys of the ``[evidence]`` table; it has all of them or does not exist."""


class Claiming(Protocol):
    """A recipe, as far as its name and its rows go."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def paper_rows(self) -> Mapping[str, int]:
        """Table -> row."""


def by_table(recipes: Sequence[Claiming]) -> dict[str, list[str]]:
    """Table -> names of the recipes that are its rows, in the paper's order; a shared one stands in each."""
    return {
        table: [recipe.name for recipe in sorted(_of(table, recipes), key=lambda recipe: recipe.paper_rows[table])]
        for table in PAPER_TABLES
    }


def _of(table: str, recipes: Sequence[Claiming]) -> list[Claiming]:
    return [recipe for recipe in recipes if table in recipe.paper_rows]


def paper_rows_errors(rows: object) -> list[str]:
    """What is wrong with ``paper_rows = { I = 10, V = 6 }`` (table -> row, from 1, in the paper's order), in words."""
    if not isinstance(rows, dict):
        return [f"paper_rows = {shown(rows)} is not a table such as {{ I = 10, V = 6 }}"]
    faults = []
    for table, row in rows.items():
        if table not in PAPER_TABLES:
            faults.append(unknown_value("paper_rows' table", table, list(PAPER_TABLES)))
        elif type(row) is not int or not 1 <= row <= PAPER_TABLES[table][1]:
            faults.append(f"paper_rows.{table} = {shown(row)} is no row from 1 to {PAPER_TABLES[table][1]}")
    return faults


def evidence_errors(evidence: object) -> list[str]:
    """What is wrong with an ``[evidence]`` table, in words."""
    if not isinstance(evidence, dict):
        return [f"evidence = {shown(evidence)} is not a table with {', '.join(EVIDENCE)}"]
    faults = [unknown_value("evidence's key", key, list(EVIDENCE)) for key in evidence if key not in EVIDENCE]
    faults += [f"evidence.{key} is missing ({what})" for key, what in EVIDENCE.items() if key not in evidence]
    for key in ("command", "hardware"):
        value = evidence.get(key, "given")
        if not isinstance(value, str) or not value.strip():
            faults.append(f"evidence.{key} = {shown(value)} is not a text ({EVIDENCE[key]})")
    seed = evidence.get("seed", 0)
    seeds = seed if isinstance(seed, list) else [seed]
    if not seeds or any(type(one) is not int or one < 0 for one in seeds):
        faults.append(f"evidence.seed = {shown(seed)} is not a seed, nor a list of seeds")
    figures = evidence.get("figures", {"": 0})
    if not isinstance(figures, dict) or not figures:
        faults.append(f"evidence.figures = {shown(figures)} is not a table of at least one number")
    else:
        faults += [
            f"evidence.figures.{name} = {shown(value)} is not a finite number"
            for name, value in figures.items()
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ]
    return faults
