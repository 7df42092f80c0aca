"""The teacher of a recipe of method ``rslad``: looked for before anything else, opened when the data are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robustq.checkpoint import load_model
from robustq.data import NO_AUGMENT, Augment, Dataset
from robustq.errors import DataError, ModelFileError, UsageError
from robustq.hardening.methods.registry import resolved_settings
from robustq.hardening.methods.teacher import AskedTeacher, CachedTeacher, Teacher
from robustq.inputs import check_model_file
from robustq.progress import note
from robustq.recipe import Recipe, format_epsilon
from robustq.workflow.setting import check_fit


def with_teacher(recipe: Recipe) -> Recipe:
    """``recipe`` with the teacher's path made absolute, so that its run can be resumed from anywhere; other methods'
    recipes as they are.

    Raises:
        UsageError: it names no teacher.
        ModelFileError: no file with content lies there.
    """
    if recipe.method != "rslad":
        return recipe
    path = str(resolved_settings(recipe)["teacher"])
    if not path:
        raise UsageError(
            f"recipe {recipe.name} learns from a robust teacher and names none; add --set rslad.teacher=FILE, a model "
            "file of robustq's with the same classes"
        )
    _named(path)
    return replace(recipe, settings={**recipe.settings, "teacher": str(Path(path).absolute())})


def open_teacher(recipe: Recipe, data: Dataset, *, augment: Augment, device: torch.device) -> Teacher | None:
    """The teacher that ``recipe`` names, on ``device``; None for methods without one.

    Raises:
        ModelFileError: it is not there, or no model file of robustq's.
        DataError: it was made for other classes or images.
    """
    if recipe.method != "rslad":
        return None
    settings = resolved_settings(recipe)
    path = _named(str(settings["teacher"]))
    try:
        network, spec, _ = load_model(path)
        check_fit(spec, data, path)
    except (ModelFileError, DataError) as error:
        raise type(error)(f"rslad.teacher: {error}") from error
    if spec.class_names and data.class_names and tuple(spec.class_names) != tuple(data.class_names):
        pairs = enumerate(zip(spec.class_names, data.class_names, strict=True))
        first = next(place for place, (ours, theirs) in pairs if ours != theirs)
        raise DataError(
            f"rslad.teacher: {path} calls class {first} '{spec.class_names[first]}', {data.name} calls it "
            f"'{data.class_names[first]}'; give a teacher of the same classes in the same order"
        )
    radius = "trained without a defence" if spec.epsilon is None else f"epsilon {format_epsilon(spec.epsilon)}"
    note(f"teacher {spec.label} ({radius}), {path}")
    network = network.to(device)
    if settings["teacher_sees"] == "augmented" and augment != NO_AUGMENT:
        return AskedTeacher(network)
    return CachedTeacher(network, data.train, mirrored=augment.flip, device=device)


def _named(path: str) -> Path:
    try:
        return check_model_file(Path(path))
    except ModelFileError as error:
        raise ModelFileError(f"rslad.teacher: {error}") from error
