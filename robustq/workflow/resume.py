"""--resume: continue the run of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robustq.data import Augment, Dataset
from robustq.errors import DataError, ModelFileError, RobustqError, UsageError, one_line
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.run_config import CONFIG, read_entries
from robustq.hardening.run_folder import RESUME, RunFolder
from robustq.hardening.saved_state import check_state
from robustq.models.spec import ModelSpec, build_model
from robustq.progress import note
from robustq.recipe import Recipe
from robustq.seals import sha256
from robustq.workflow.job import TrainResult
from robustq.workflow.run_log import check_forecast, log_run
from robustq.workflow.setup import check_last_batch, data_for, pick_device, versions
from robustq.workflow.training_run import complete_run, prepare


def resume_run(
    run: Path | str, *, data: str | None = None, device: str | None = None, custom_model: str | None = None
) -> TrainResult:
    """Continue a run of train or harden that has not finished.

    The folder holds recipe, network, data and seed. On the same CPU the result is bit for bit that of a run without the
    stop. Everything is checked before a file of the folder is written.

    Args:
        run: path of its folder.
        data: new place of the same data, if it was moved: a folder or file; its content is checked.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``; None: as before.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.

    Returns:
        the result of train_model or harden_model, whichever began the run.

    Raises:
        UsageError: no such run, or it has finished; it writes for TensorBoard, which is not installed here.
        ModelFileError: its saved state is damaged.
        RunLockedError: it is still running.
        DataError: the data are missing or have changed.
        OutOfMemoryError: a batch does not fit; one that does is named.
        NotFiniteError: NaN or Inf in training; saved states are kept.
        RunStoppedError: stopped by Ctrl-C; the command that resumes the run is named.
    """
    path = Path(run)
    folder = RunFolder.reopen(path)
    with folder:
        config = folder.config
        recipe, spec, augment = _read_entries(path, config)
        state = folder.load()
        if recipe.tensorboard:
            check_tensorboard()
        place = pick_device(device or config["device"])
        for line in differences(config, place):
            note(f"note    {line}")
        loaded = data_for(
            spec, data, path, train_images=recipe.train_images, skip_bad_images=config["data"]["skip_bad_images"]
        )
        _check_same_data(config, loaded)
        network = build_model(spec, custom_model=custom_model).to(place)
        check_last_batch(network, spec, len(loaded.train), recipe)
        training = prepare(network, spec, loaded, recipe, augment=augment, seed=config["seed"], device=place)
        try:
            check_state(state, training)
            training.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"{path / RESUME}: does not fit the config of {path} ({one_line(error, longest=100)})"
            ) from error
        log_run(spec, loaded, training, config, resumed=path)
        if not training.finished:
            check_forecast(training, parent=path)
        folder.repair(state)
        return complete_run(folder, training, spec, loaded)


def differences(config: dict[str, Any], device: torch.device) -> list[str]:
    """Changes since the run began: versions, device, the model file that it started from."""
    now = versions()
    lines = [
        f"{name} was {before} when the run began, and is {now[name]}: the result may differ by rounding"
        for name, before in config["versions"].items()
        if name in now and now[name] != before
    ]
    if config["device"] != str(device):
        lines.append(f"the run began on {config['device']} and continues on {device}: results may differ by rounding")
    source = config.get("source")
    if source is not None:
        file = Path(source["path"])
        if not file.is_file():
            lines.append(f"{file}, from which the run began, is missing; it is no longer needed")
        elif sha256(file) != source["sha256"]:
            lines.append(f"{file} has changed since the run began; the run continues from its own state")
    return lines


def _read_entries(path: Path, config: dict[str, Any]) -> tuple[Recipe, ModelSpec, Augment]:
    """Recipe, network and augmentation of config.json.

    Raises:
        UsageError: it was edited, or another version wrote it.
    """
    try:
        return read_entries(config)
    except (RobustqError, TypeError) as error:
        raise UsageError(
            f"{path / CONFIG}: cannot be used ({error}); resume with the robustq that began the run"
        ) from error


def _check_same_data(config: dict[str, Any], data: Dataset) -> None:
    if data.digest() != config["data"]["digest"]:
        raise DataError(
            f"{data.name} is not the data that the run began with ({config['data']['name']}); restore it, name its "
            "new place with --data, or start a new run"
        )
