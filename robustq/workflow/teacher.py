"""The robust teacher that a recipe names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robustq.checkpoint import load_model
from robustq.data import NO_AUGMENT, Augment, Dataset
from robustq.errors import DataError, ModelFileError, UsageError
from robustq.files import check_model_file
from robustq.hardening.methods.method import Teacher
from robustq.hardening.methods.registry import SETTINGS, resolved_settings
from robustq.hardening.methods.rslad import CachedTeacher, OnlineTeacher
from robustq.progress import note
from robustq.recipe import Recipe, format_epsilon
from robustq.workflow.setup import check_fit


def with_absolute_teacher(recipe: Recipe) -> Recipe:
    """``recipe`` with an absolute path of its teacher, if it has one, so that a run can be resumed from any folder.

    UsageError if it needs a teacher and names none, ModelFileError if the file is missing or empty.
    """
    if not SETTINGS[recipe.method].needs_teacher:
        return recipe
    path = str(resolved_settings(recipe)["teacher"])
    if not path:
        raise UsageError(
            f"recipe {recipe.name} needs a robust teacher; add --set {recipe.method}.teacher=FILE, a model file of "
            "robustq with the same classes"
        )
    try:
        check_model_file(Path(path))
    except ModelFileError as error:
        raise ModelFileError(f"{recipe.method}.teacher: {error}") from error
    return replace(recipe, settings={**recipe.settings, "teacher": str(Path(path).absolute())})


def open_teacher(recipe: Recipe, data: Dataset, *, augment: Augment, device: torch.device) -> Teacher | None:
    """The teacher that ``recipe`` names, on ``device``; None for methods without one.

    Raises:
        ModelFileError: the file is missing, or no model file of robustq.
        DataError: it was made for other classes or images.
    """
    if not SETTINGS[recipe.method].needs_teacher:
        return None
    settings = resolved_settings(recipe)
    path, key = Path(settings["teacher"]), f"{recipe.method}.teacher"
    try:
        check_model_file(path)
        network, spec, _ = load_model(path)
        check_fit(spec, data, path)
    except (ModelFileError, DataError) as error:
        raise type(error)(f"{key}: {error}") from error
    if spec.class_names and data.class_names and tuple(spec.class_names) != tuple(data.class_names):
        pairs = enumerate(zip(spec.class_names, data.class_names, strict=True))
        first = next(index for index, (ours, theirs) in pairs if ours != theirs)
        raise DataError(
            f"{key}: {path} calls class {first} '{spec.class_names[first]}', {data.name} calls it "
            f"'{data.class_names[first]}'; give a teacher of the same classes in the same order"
        )
    radius = "trained without a defence" if spec.epsilon is None else f"epsilon {format_epsilon(spec.epsilon)}"
    note(f"teacher {spec.label} ({radius}), {path}")
    network = network.to(device)
    if settings["teacher_sees"] == "augmented" and augment != NO_AUGMENT:
        return OnlineTeacher(network)
    return CachedTeacher(network, data.train, mirrored=augment.flip, device=device)
