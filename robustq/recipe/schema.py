"""The keys of a recipe with their types, ranges and choices, and the checks of their values.

All errors of a recipe are collected, each as one phrase with the key, the value and the values allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType, NoneType
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_type_hints

from robustq.errors import RecipeError

FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
PRECISIONS = (FLOAT32, TF32, BFLOAT16)  # of a training pass (robustq.hardening.precision)
SAME, INTEGER = "same", "integer"
SIDE_PRECISIONS = (SAME, FLOAT32, BFLOAT16, INTEGER)  # of the auxiliary passes; TF32 is one switch for a whole step

METADATA = ("paper_rows", "evidence")  # describe a recipe; no run depends on them (robustq.recipe.paper)


class Range(NamedTuple):
    """Smallest and largest value. Upper ends lie far above any use, and below the limits of memory."""

    low: float
    high: float


class Choices(NamedTuple):
    """Allowed words."""

    words: tuple[str, ...]


TRAINING = "training"  # marks keys without a meaning for methods that do not train


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run. Optional keys that are None are filled in by the model or the command line."""

    name: str  # path below recipes/, or the .toml file
    summary: str = ""  # one sentence for `robustq recipes`
    method: str
    data: str | None = None
    architecture: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    shared_sum_scale: bool | None = None  # quantize both inputs of each residual sum by one quantizer
    epsilon: float | None = None  # radius of the threat model in [0, 1]; None: the model's, else recipe.epsilon's
    epochs: Annotated[int, Range(1, 100_000), TRAINING]
    batch_size: Annotated[int, Range(2, 65_536), TRAINING]
    lr: Annotated[float, Range(0, 100), TRAINING]  # peak learning rate
    schedule: Annotated[str, Choices(("cosine", "steps")), TRAINING] = "cosine"  # to 0, or / 10 at each milestone
    milestones: Annotated[tuple[int, ...], TRAINING] = ()  # in epochs
    warmup_epochs: Annotated[float, Range(0, 100_000), TRAINING] = 0.0  # linear warm-up
    momentum: Annotated[float, Range(0, 0.9999), TRAINING] = 0.9
    weight_decay: Annotated[float, Range(0, 10), TRAINING] = 5e-4  # not of learned activation thresholds
    label_smoothing: Annotated[float, Range(0, 0.9999), TRAINING] = 0.0
    clip_gradient: Annotated[float, Range(0, 1e6), TRAINING] = 0.0  # largest L2 norm of the whole gradient; 0: off
    ema_decay: Annotated[float, Range(0, 0.9999), TRAINING] = 0.0  # hardening.averaging; 0: off
    awp_gamma: Annotated[float, Range(0, 1), TRAINING] = 0.0  # size of the weight perturbation, hardening.awp; 0: off
    awp_warmup_epochs: Annotated[int, Range(0, 100_000), TRAINING] = 0  # epochs before the perturbation begins
    precision: Annotated[str, Choices(PRECISIONS), TRAINING] = FLOAT32
    side_precision: Annotated[str, Choices(SIDE_PRECISIONS), TRAINING] = SAME  # `same`: as `precision`
    compile: Annotated[bool, TRAINING] = False  # torch.compile for the passes of a training step
    cuda_graphs: Annotated[bool, TRAINING] = False  # with `compile` on a GPU: record and replay the passes
    crop_padding: Annotated[int | None, Range(0, 4096), TRAINING] = None  # augmentation, in pixels; None: by the data
    flip: Annotated[bool | None, TRAINING] = None  # augmentation; None: by the data
    image_size: Annotated[int, Range(0, 4096)] = 0  # side of the images of a folder in pixels; 0: the size they have
    train_images: Annotated[int, Range(0, 1e9)] = 0  # 0: all
    calibration_images: Annotated[int, Range(2, 16_384)] = 512  # set the activation scales before the first step
    monitor_images: Annotated[int, Range(1, 1e9)] = 500  # held-out images for the accuracies of each epoch
    stop_on_collapse: Annotated[bool, TRAINING] = True  # hardening.monitor
    tensorboard: Annotated[bool, TRAINING] = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # the method's own table
    paper_rows: Mapping[str, int] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether the method trains the network; recipes of others have no epochs."""
        return self.epochs > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: every value that a run depends on, as kept in its config.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in METADATA}
        values |= {"milestones": list(self.milestones), "settings": dict(self.settings)}
        return {key: value for key, value in values.items() if self.trains or key not in TRAINING_KEYS}

    def metadata(self) -> dict[str, Any]:
        """Plain JSON types: the keys that no run depends on."""
        return {"paper_rows": dict(self.paper_rows), "evidence": dict(self.evidence)}


class _Key(NamedTuple):
    """What :class:`Recipe` declares of a key."""

    types: tuple[type, ...]
    range: Range | None
    choices: tuple[str, ...]
    is_training: bool
    is_required: bool


def _declared() -> dict[str, _Key]:
    keys = {}
    hints = get_type_hints(Recipe, include_extras=True)
    for entry in fields(Recipe):
        if entry.name in ("name", "settings", *METADATA):
            continue
        hint, marks = hints[entry.name], getattr(hints[entry.name], "__metadata__", ())
        hint = get_args(hint)[0] if marks else hint
        types = {float: (int, float), tuple[int, ...]: (list,)}.get(hint) or tuple(
            one for one in get_args(hint) or (hint,) if one is not NoneType
        )
        keys[entry.name] = _Key(
            (int, float, str) if entry.name == "epsilon" else types,  # epsilon = "8/255"
            next((mark for mark in marks if isinstance(mark, Range)), None),
            next((mark.words for mark in marks if isinstance(mark, Choices)), ()),
            TRAINING in marks,
            entry.default is entry.default_factory is MISSING,
        )
    return keys


_DECLARED = _declared()

KEYS = tuple(_DECLARED)  # of a recipe, without the methods' own tables
TRAINING_KEYS = tuple(key for key, declared in _DECLARED.items() if declared.is_training)


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Base of a method's own table of a recipe, and the method's properties.

    A field may have a check as metadata (``errors``, see :mod:`robustq.hardening.methods.settings`); RecipeError with
    all invalid values.
    """

    method: ClassVar[str]
    """The method's name in a recipe, which is also the name of its table."""

    trains: ClassVar[bool] = True
    defends: ClassVar[bool] = True  # against attacks
    reads_labels: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False  # has the keys of :class:`robustq.hardening.methods.rslad.RsladSettings`

    def __post_init__(self) -> None:
        checks = [(entry.name, entry.metadata["errors"]) for entry in fields(self) if "errors" in entry.metadata]
        found = [error for name, errors in checks for error in errors(f"{self.method}.{name}", getattr(self, name))]
        if found:
            raise RecipeError("; ".join(found))


@dataclass(frozen=True)
class Vocabulary:
    """The registries of methods and models; an empty one is not checked."""

    settings: Mapping[str, type[MethodSettings]]  # method -> dataclass of its own table
    architectures: Sequence[str] = ()
    bits: Sequence[int] = ()  # widths

    def choices(self, key: str) -> Sequence[Any]:
        """The allowed values of a recipe's key; empty: not checked."""
        registries = {"method": tuple(self.settings), "architecture": self.architectures}
        return registries.get(key, self.bits if key in ("weight_bits", "act_bits") else _DECLARED[key].choices)


def validation_errors(values: dict[str, Any], vocabulary: Vocabulary | None) -> list[str]:
    """All errors of a recipe's values, except those of the radius epsilon."""
    known = Vocabulary({}) if vocabulary is None else vocabulary
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    method = flat.get("method")
    kind = known.settings.get(method) if isinstance(method, str) else None
    trains = vocabulary is not None if kind is None else kind.trains
    # Suggests `odgq.domains` where `domains` was written.
    inner = {} if kind is None else {entry.name: f"{method}.{entry.name}" for entry in fields(kind)}
    errors = []
    for key, value in flat.items():
        if key in KEYS:
            errors += _value_errors(key, value, known.choices(key))
        else:
            errors.append(_unknown(key, [*KEYS, *known.settings], inner))
    if kind is not None and not kind.trains:
        errors += [
            f"{key} has no meaning for method '{method}', which does not train; leave it out"
            for key in flat
            if key in TRAINING_KEYS
        ]
    if kind is not None and not kind.reads_labels and flat.get("label_smoothing"):
        errors.append(f"label_smoothing has no meaning for method '{method}', which reads no labels; leave it out")
    errors += [
        f"{key} is missing"
        for key, declared in _DECLARED.items()
        if declared.is_required and key not in flat and (trains or not declared.is_training)
    ]
    if flat.get("cuda_graphs") is True and flat.get("compile") is not True:
        errors.append("cuda_graphs needs compile = true, whose passes it records")
    milestones = flat.get("milestones", [])
    if isinstance(milestones, list) and not all(type(epoch) is int and epoch > 0 for epoch in milestones):
        errors.append(f"milestones = {shown(milestones)} must be positive integers (epochs)")
    errors += [
        f"[{shown(key)[1:-1]}] is not the table of method {shown(method)}; only [{method}] is read"
        for key in tables
        if key != method
    ]
    return errors if kind is None else errors + settings_errors(tables.get(str(method), {}), kind, table=str(method))


def _value_errors(key: str, value: Any, choices: Sequence[Any]) -> list[str]:
    """Type, range and choices of a known key."""
    declared = _DECLARED[key]
    if errors := _type_errors(key, value, declared.types):
        return errors
    span = declared.range
    if span is not None and not value >= span.low:
        return [f"{key} = {shown(value)} must be at least {span.low:g}"]
    if span is not None and value > span.high:
        return [f"{key} = {shown(value)} must be at most {f'{span.high:.4f}'.rstrip('0').rstrip('.')}"]
    # A colon names a custom model, which is known only once it is built.
    is_custom = key == "architecture" and ":" in value
    return [unknown_value(key, value, choices)] if choices and value not in choices and not is_custom else []


def _type_errors(key: str, value: Any, types: tuple[type, ...]) -> list[str]:
    if isinstance(value, types) and (bool in types or not isinstance(value, bool)):
        return []
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a word", list: "a list"}
    text = " or ".join(names[kind] for kind in types if not (kind is int and float in types))
    return [f"{key} = {shown(value)} is not {text}"]


def check_settings(settings: Mapping[str, Any], kind: type, *, table: str) -> Any:
    """Build the settings dataclass ``kind`` from a method's table; RecipeError as :func:`settings_errors` says."""
    errors = settings_errors(settings, kind, table=table)
    if errors:
        raise RecipeError("; ".join(errors))
    return kind(**settings)


def settings_errors(settings: Mapping[str, Any], kind: type, *, table: str) -> list[str]:
    """Validation errors of a method's table: a key that ``kind`` does not have (with the nearest), a value of another
    type than the default's, or one that ``kind`` itself refuses.
    """
    known: dict[str, Any] = {entry.name: entry.default for entry in fields(kind)}
    errors = []
    for key, value in settings.items():
        if key not in known:
            errors.append(_unknown(f"{table}.{key}", [f"{table}.{other}" for other in known]))
            continue
        default = known[key]
        numbers: tuple[type, ...] = (int, float)
        types = (bool,) if isinstance(default, bool) else numbers if isinstance(default, numbers) else (str, *numbers)
        errors += _type_errors(f"{table}.{key}", value, types)
    if not errors:
        try:
            kind(**settings)
        except RecipeError as error:
            errors.append(str(error))
    return errors


def unknown_value(key: str, value: object, known: Sequence[Any]) -> str:
    """``key = value is unknown``, with the known values and the nearest of them."""
    near = difflib.get_close_matches(str(value)[:80], list(map(str, known)), n=1, cutoff=0.5)
    nearest = f" (nearest: {near[0]})" if near else ""
    return f"{key} = {shown(value)} is unknown; known: {', '.join(map(str, known))}{nearest}"


def number_errors(
    key: str, value: float, *, low: float, high: float, integer: bool = False, above: bool = False
) -> list[str]:
    """Validation errors (none or one) of a number in a method's table, whose ``key`` includes the table's name.

    The allowed numbers are ``low`` to ``high``; with ``above`` without ``low`` itself, with ``integer`` no fractions.
    """
    if (low < value if above else low <= value) and value <= high and not (integer and value != int(value)):
        return []
    span = f"over {low:g} and at most {high:.9g}" if above else f"from {low:g} to {high:.9g}"
    return [f"{key} = {shown(value)} must be {'an integer' if integer else 'a number'} {span}"]


def shown(value: object) -> str:
    """``repr``, cut short: a recipe may hold a number of a thousand digits."""
    try:
        text = repr(value)
    except ValueError:  # CPython prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(key: str, known: Sequence[str], inner: Mapping[str, str] = MappingProxyType({})) -> str:
    """``inner``: the method's own keys without -> with its table; they win among equally near keys."""
    key = key[:80]
    near = difflib.get_close_matches(key, [*inner, *known], n=1, cutoff=0.5)
    return f"unknown key '{key}'" + (f" (nearest: {inner.get(near[0], near[0])})" if near else "")
