"""Recipes: every setting of a training run in one small TOML file, checked as a whole before anything starts.

A recipe's name is its path below recipes/ without the ending: ``cifar10/resnet20-w4a4-odgq``. Keys that are absent are
settled by the model, the data set or the command line. The table named like the method (``[odgq]``) holds the method's
own keys, which the method checks itself (:mod:`robustq.hardening`). How files are found and extend one another is in
:mod:`robustq.recipe.files`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from robustq.errors import RecipeError, UsageError
from robustq.recipe.files import EXTENDS, read_values
from robustq.recipe.files import recipe_names as recipe_names
from robustq.recipe.schema import (
    FLOAT32,
    SAME,
    TRAINING_KEYS,
    Vocabulary,
    evidence_errors,
    find_faults,
    paper_rows_errors,
)

UNDEFENDED = frozenset({"natural", "ptq"})
"""Methods that know of no attack."""


CLAIMS: Mapping[str, Callable[[object], list[str]]] = {"paper_rows": paper_rows_errors, "evidence": evidence_errors}
"""Keys by which a recipe speaks of itself and on which no run depends -> what is wrong with a value of them."""


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
        method: one of :data:`robustq.recipe.schema.METHODS`.
        data, architecture, weight_bits, act_bits: the task and the network; None leaves them to the model or the
            command line.
        shared_sum_scale: quantize both inputs of each residual sum by one quantizer; None: as the model has it.
        epsilon: radius of the threat model in [0, 1]; None: what the model says, else 8/255.
        epochs: passes over the training part; like all of :data:`robustq.recipe.schema.TRAINING_KEYS`, not for ``ptq``.
        batch_size: images a step.
        lr: peak learning rate.
        schedule: ``cosine`` (to 0) or ``steps`` (divided by 10 at each of ``milestones``, in epochs).
        warmup_epochs: epochs of linear warm-up, may be a fraction.
        momentum, weight_decay: of SGD; learned activation thresholds are not decayed.
        label_smoothing: of the task loss of every method (:class:`robustq.hardening.methods.method.CrossEntropy`).
        clip_gradient: longest L2 norm of the gradient of all weights together; a longer one is scaled down. 0: never.
        ema_decay: of an average of the weights that is judged and kept in their place
            (:mod:`robustq.hardening.averaging`); 0: the weights themselves.
        awp_gamma: size of the weight perturbation (:mod:`robustq.hardening.awp`); 0: none.
        awp_warmup_epochs: epochs before it begins.
        precision: what training steps compute in, ``float32``, ``tf32`` or ``bfloat16``
            (:mod:`robustq.hardening.precision`).
        side_precision: what their passes compute in from which no weight gets a gradient (crafting, ODG-Q's clean
            features), ``float32``, ``bfloat16`` or ``integer``; ``same``: ``precision``.
        compile: let torch.compile make the passes of training steps (:mod:`robustq.hardening.precision`).
        cuda_graphs: with ``compile`` on a GPU, record those passes and replay them.
        crop_padding, flip: augmentation; None: by the data set.
        image_size: side in pixels to which folders of images are resized (0: they all have one square size already).
        train_images: use only so many training images (0: all).
        calibration_images: training images that set the activation scales before the first step.
        monitor_images: held-out images on which clean and PGD-10 accuracy are watched each epoch.
        stop_on_collapse: end the run when robust accuracy collapses (:mod:`robustq.hardening.monitor`).
        tensorboard: write the metrics as TensorBoard's event files too (:mod:`robustq.hardening.metrics`).
        settings: the method's own table.
        paper_rows: table of arXiv:2210.08701 -> the row that this recipe is, counted from 1.
        evidence: the figures that a run of it gave, and how (:data:`robustq.recipe.schema.EVIDENCE`); empty until then.
    """

    name: str
    summary: str = ""
    method: str
    data: str | None = None
    architecture: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    shared_sum_scale: bool | None = None
    epsilon: float | None = None
    epochs: int
    batch_size: int
    lr: float
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    clip_gradient: float = 0.0
    ema_decay: float = 0.0
    awp_gamma: float = 0.0
    awp_warmup_epochs: int = 0
    precision: str = FLOAT32
    side_precision: str = SAME
    compile: bool = False
    cuda_graphs: bool = False
    crop_padding: int | None = None
    flip: bool | None = None
    image_size: int = 0
    train_images: int = 0
    calibration_images: int = 512
    monitor_images: int = 500
    stop_on_collapse: bool = True
    tensorboard: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    paper_rows: Mapping[str, int] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with every value that a run depends on, as kept in its config.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in CLAIMS}
        values |= {"milestones": list(self.milestones), "settings": dict(self.settings)}
        return {key: value for key, value in values.items() if self.method != "ptq" or key not in TRAINING_KEYS}

    def claims(self) -> dict[str, Any]:
        """Plain JSON types: what the recipe says of itself and no run depends on."""
        return {"paper_rows": dict(self.paper_rows), "evidence": dict(self.evidence)}


def check_name(name: str) -> None:
    """Make sure that ``name`` is a recipe's name or a file of TOML, without a look at its keys.

    Raises:
        RecipeError: it is neither, or it extends something that is not there.
    """
    read_values(name)


def load_recipe(name: str, overrides: Sequence[str] = (), *, vocabulary: Vocabulary | None = None) -> Recipe:
    """The recipe called ``name`` (or the TOML file at that path) with ``key=value`` overrides laid over it.

    Without ``vocabulary`` the method's own table, the architecture and the widths are taken as they stand.

    Raises:
        RecipeError: no such recipe (the nearest is named), broken TOML, an unknown key, a value of the wrong kind or
            range; all faults of one recipe are told at once.
    """
    values = read_values(name)
    faults = [fault for fault in (_override(values, override) for override in overrides) if fault is not None]
    claims = {key: values.pop(key) for key in CLAIMS if key in values}
    faults += [fault for key, value in claims.items() for fault in CLAIMS[key](value)]
    faults += find_faults(values, vocabulary)
    if isinstance(values.get("epsilon"), int | float | str):
        try:
            parse_epsilon(values["epsilon"])
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError(f"{name}: " + "; ".join(faults))
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    if "epsilon" in flat:
        flat["epsilon"] = parse_epsilon(flat["epsilon"])
    flat["milestones"] = tuple(flat.get("milestones", ()))
    return replace(
        Recipe(name=name, method="", epochs=0, batch_size=0, lr=0.0),
        **flat,
        **claims,
        settings=tables.get(flat["method"], {}),
    )


def _override(values: dict[str, Any], text: str) -> str | None:
    """Lay ``key=value`` over ``values``; what is wrong with it, in words, or None."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        return f"--set '{text}' has no value; write --set key=value, e.g. --set epochs=10"
    if key.strip().partition(".")[0] in (EXTENDS, *CLAIMS):
        return f"--set '{text}': {key.strip()} stands in a recipe file only; change it there"
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
