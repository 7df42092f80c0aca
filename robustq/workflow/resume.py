"""--resume: a run folder goes on where it was stopped, killed or cut off."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from robustq.data import Augment, Dataset
from robustq.errors import DataError, ModelFileError, RobustqError, UsageError
from robustq.files import sha256
from robustq.hardening.methods.registry import resolved_settings
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.run_folder import RESUME, RunFolder
from robustq.models.spec import ModelSpec, build_model
from robustq.progress import note
from robustq.recipe import Recipe
from robustq.workflow.run_log import announce, told_forecast
from robustq.workflow.setup import data_for, pick_device, versions
from robustq.workflow.training_run import carry_out, prepare


def resume_run(
    run: Path | str, *, data: str | None = None, device: str | None = None, own_model: str | None = None
) -> dict[str, Any]:
    """Go on with a run of train or harden that has not finished.

    The folder says everything: recipe, network, data, seed. On the same CPU the result is bit for bit what the run
    would have given without the stop.

    Args:
        run: its folder.
        data: where the same data lies now, if it was moved: a folder or file; its content is checked.
        device: ``cpu``, ``cuda``; None: where the run began.
        own_model: the ``module:function`` that built the network, where it is the user's own.

    Returns:
        As :func:`robustq.workflow.train.train_model` or ``harden_model``, whichever began it.

    Raises:
        UsageError: no such run, or it has finished; it writes for TensorBoard, which is not installed here.
        RunLockedError: it is still going.
        DataError: the data is gone, or is not the same any more.
        RobustqError: as the function that began it.
    """
    path = Path(run)
    folder = RunFolder.reopen(path)
    with folder:
        config = folder.config
        recipe, spec, augment = _settings(path, config)
        if recipe.tensorboard:
            check_tensorboard()
        place = pick_device(device or config["device"])
        for line in differences(config, place):
            note(f"note    {line}")
        loaded = data_for(
            spec, data, path, train_images=recipe.train_images, skip_bad_images=config["data"]["skip_bad_images"]
        )
        _check_same_data(config, loaded)
        network = build_model(spec, own_model=own_model).to(place)
        training = prepare(network, spec, loaded, recipe, augment=augment, seed=config["seed"], device=place)
        state = folder.load()
        try:
            training.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0][:100]
            raise ModelFileError(f"{path / RESUME}: does not fit the run that {path} describes ({first})") from error
        announce(spec, loaded, training, config, resumed=path)
        if not training.finished:
            told_forecast(training, parent=path)
        return carry_out(folder, training, spec, loaded)


def differences(config: dict[str, Any], device: torch.device) -> list[str]:
    """What is not as it was when the run began: versions, device, the model file that it began from."""
    now = versions()
    lines = [
        f"{name} was {before} when the run began, and is {now[name]}: the result may differ in its last digits"
        for name, before in config["versions"].items()
        if name in now and now[name] != before
    ]
    if config["device"] != str(device):
        lines.append(f"the run began on {config['device']} and goes on on {device}: last digits may differ")
    source = config["source"]
    if source is not None:
        file = Path(source["path"])
        if not file.is_file():
            lines.append(f"{file}, from which the run began, is gone; it is not needed any more")
        elif sha256(file) != source["sha256"]:
            lines.append(
                f"{file} is not the file any more from which the run began; the run goes on from its own state"
            )
    return lines


def _settings(path: Path, config: dict[str, Any]) -> tuple[Recipe, ModelSpec, Augment]:
    """Recipe, network and augmentation as config.json has them.

    Raises:
        UsageError: it was changed, or another version wrote it.
    """
    try:
        values = config["recipe"]
        unknown = sorted(set(values) - {entry.name for entry in fields(Recipe)})
        if unknown:
            raise UsageError(f"the recipe key '{unknown[0]}' is unknown")
        recipe = Recipe(**{**values, "milestones": tuple(values["milestones"])})
        resolved_settings(recipe)
        return recipe, ModelSpec.from_dict(config["spec"]), Augment(**config["augment"])
    except (RobustqError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path / 'config.json'}: cannot be used ({error}); resume with the robustq that began the run"
        ) from error


def _check_same_data(config: dict[str, Any], data: Dataset) -> None:
    if data.digest() != config["data"]["digest"]:
        raise DataError(
            f"{data.name} is not the data any more that the run began with ({config['data']['name']}); put it back, "
            "name the place where it is now with --data, or start a new run"
        )
