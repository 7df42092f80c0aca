"""A run: its teacher, calibration, training and result.

The teacher of a recipe of method ``rslad``: looked for before anything else, opened when the data are there.

One training run in its folder: from a network and a recipe to best.pt and result.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.checkpoint import load_model
from robustq.data import NO_AUGMENT, Augment, Dataset, to_float
from robustq.errors import (
    DataError,
    ModelFileError,
    NotFiniteError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    RunStoppedError,
    UsageError,
)
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.files import check_model_file, free_path, sha256
from robustq.hardening.diagnosis import runs_out
from robustq.hardening.forecast import what_fits
from robustq.hardening.methods.registry import build_method, resolved_settings
from robustq.hardening.methods.rslad import AskedTeacher, CachedTeacher, Teacher
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.monitor import Monitor
from robustq.hardening.run_folder import RUNS, RunFolder, remember_hardened
from robustq.hardening.state import StopRequest, restore
from robustq.hardening.trainer import Trained, Training
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec
from robustq.progress import bar, note
from robustq.recipe import Recipe, format_epsilon
from robustq.workflow.run_log import announce, announce_safety, told_forecast
from robustq.workflow.setup import DEFAULT_EPSILON, augmentation, check_fit, check_last_batch, versions


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


EVALUATION_BATCH = 500


def run_recipe(
    model: nn.Module,
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    out: Path | None,
    source: Path | None,
    skip_bad_images: bool = False,
) -> dict[str, Any]:
    """Train ``model`` on ``device`` by ``recipe``, keep what happens in a run folder, count clean accuracy at the end.

    Args:
        model: built from ``spec``; left with the best epoch's weights, in eval mode.
        spec, data, recipe: what is trained, on what, how.
        seed: of order, augmentation and the method's draws.
        device: where.
        out: run folder, checked to be free; None: ``runs/<label>-<method>``.
        source: the model file that was fine-tuned; None from scratch: then the activation scales are calibrated first,
            with batch statistics, since the running ones mean nothing.
        skip_bad_images: how ``data`` was loaded, for a process that resumes the run.

    Returns:
        What train and harden print, and result.json holds.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
        OutOfMemoryError: names the batch size that fits; nothing is written.
        OutputError: the disk is too full; what was saved before stands.
        NotFiniteError: NaN or Inf; what was saved before stands.
        RunStoppedError: by Ctrl-C or SIGTERM; says how to go on.
    """
    check_last_batch(model, spec, len(data.train), recipe)
    if recipe.tensorboard:
        check_tensorboard()
    if source is None:
        calibrate_on(model, data, recipe, device=device, from_scratch=True)
    augment = augmentation(recipe, data)
    config = {
        "command": "train" if source is None else "harden",
        "recipe": {**recipe.to_dict(), "settings": resolved_settings(recipe)},
        "source": None if source is None else {"path": str(source.absolute()), "sha256": sha256(source)},
        "spec": spec.to_dict(),
        "data": {"name": data.name, "digest": data.digest(), "skip_bad_images": skip_bad_images},
        "augment": {"crop_padding": augment.crop_padding, "flip": augment.flip},
        "seed": seed,
        "device": str(device),
        "versions": versions(),
    }
    training = prepare(model, spec, data, recipe, augment=augment, seed=seed, device=device)
    announce(spec, data, training, config)
    told_forecast(training, parent=(RUNS if out is None else out.parent))
    folder = _new_folder(out, RUNS / f"{spec.label}-{recipe.method}", config, training)
    return carry_out(folder, training, spec, data)


def prepare(
    model: nn.Module,
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    augment: Augment,
    seed: int,
    device: torch.device,
) -> Training:
    """A training at its beginning.

    Raises:
        OutOfMemoryError: the method's own memory (the perturbation set of ODG-Q) or the data do not fit.
        RobustqError: the teacher that the recipe names cannot be used.
    """
    epsilon = DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
    prepared: list[Training] = []

    def work() -> None:
        teacher = open_teacher(recipe, data, augment=augment, device=device)
        method = build_method(
            recipe,
            model,
            epsilon=epsilon,
            image_shape=(spec.channels, spec.image_size, spec.image_size),
            samples=len(data.train),
            device=device,
            seed=seed,
            teacher=teacher,
        )
        images, labels = data.holdout.take(recipe.monitor_images)
        monitor = Monitor(
            to_float(images.to(device)),
            labels.to(device),
            epsilon=epsilon if method.adversarial else None,
            batch_size=EVALUATION_BATCH,
            seed=seed,
        )
        prepared.append(Training(model, method, data.train, monitor, recipe, augment=augment, seed=seed, device=device))

    if runs_out(work):
        raise OutOfMemoryError(
            f"out of memory on {device} before the first batch; lower --set batch_size={recipe.batch_size} or "
            f"--set monitor_images={recipe.monitor_images}"
        )
    return prepared[0]


def carry_out(folder: RunFolder, training: Training, spec: ModelSpec, data: Dataset) -> dict[str, Any]:
    """Train from where ``training`` stands, which ``folder`` holds already, to result.json; gives the folder back.

    A run whose robust accuracy collapses ends there, with the best epoch's weights and a result that says so.

    Raises:
        OutOfMemoryError, OutputError, NotFiniteError, RunStoppedError: as :func:`run_recipe`.
    """
    command = folder.resume_command
    outcome: list[Trained] = []
    with folder:
        announce_safety(folder)
        try:
            with StopRequest() as stop:
                starved = runs_out(lambda: outcome.append(training.run(folder, stop)))
            if starved:
                raise OutOfMemoryError(
                    f"out of memory in epoch {training.standing.epoch + 1} with batches of "
                    f"{training.recipe.batch_size:,} on {training.device}; {what_fits(training)}, as a new run; "
                    f"or free memory and go on: {command}"
                )
            restore(training.model, training.standing.best_weights)
            right, count = accuracy_on_test(training.model, data, device=training.device)
            result = _result(folder, spec, training, outcome[0], right, count)
            folder.finish(result)
        except RunStoppedError as error:
            raise RunStoppedError(f"{error}; go on with: {command}") from error
        except KeyboardInterrupt as error:
            if folder.finished:  # it came in the last moment
                raise RunStoppedError(f"stopped, but the run has finished: {folder.path / 'best.pt'}") from error
            raise RunStoppedError(f"stopped at once; saved: {folder.progress()}; go on with: {command}") from error
        except NotFiniteError as error:
            raise NotFiniteError(f"{folder.path}: {error}") from error
        except OSError as error:
            raise OutputError(
                f"{error.filename or folder.path}: {error.strerror or error}; what was saved before stands: free the "
                f"place, then {command}"
            ) from error
    if folder.config["command"] == "harden" and training.recipe.method != "natural":
        remember_hardened(folder.path)  # an undefended twin must not become what a bare export ships
    return result


def _new_folder(out: Path | None, default: Path, config: dict[str, Any], training: Training) -> RunFolder:
    while True:
        path = out or free_path(default)
        try:
            return RunFolder.create(path, config, training.state_dict())
        except OutputExistsError:
            if out is not None:
                raise  # a default name that another run took in this very moment: the next one is free
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; free the place or name another one") from error


def _result(
    folder: RunFolder, spec: ModelSpec, training: Training, trained: Trained, right: int, count: int
) -> dict[str, Any]:
    checkpoint = folder.path / "best.pt"
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint.absolute()),
        "run": str(folder.path.absolute()),
        "model": spec.label,
        "recipe": training.recipe.name,
        "clean_accuracy": right / count,
        "clean_interval": list(wilson_interval(right, count)),
        "test_images": count,
        "epochs": training.recipe.epochs,
        "epochs_done": training.standing.epoch,
        "best_epoch": trained.best_epoch,
        "holdout_clean_accuracy": trained.best.clean,
        "holdout_pgd10_accuracy": trained.best.robust,
        "seconds_per_epoch": trained.seconds_per_epoch,
        "size_bytes": checkpoint.stat().st_size,
        "epsilon": spec.epsilon,
        "seed": training.seed,
        "collapsed": None if trained.collapse is None else trained.collapse.to_dict(),
        "shortfalls": [] if trained.collapse is None else [f"{folder.path}: {trained.collapse}"],
    }
    if folder.config["command"] == "harden":
        result |= {"bits": spec.weight_bits, "method": training.recipe.method}
    return result


def calibrate_on(model: nn.Module, data: Dataset, recipe: Recipe, *, device: torch.device, from_scratch: bool) -> None:
    """Set the activation scales of ``model`` from the recipe's number of unaugmented training images.

    Raises:
        OutOfMemoryError: so many images do not fit at once.
    """

    def work() -> None:
        images, _ = data.train.take(recipe.calibration_images)
        calibrate(model, to_float(images.to(device)), from_scratch=from_scratch)

    if runs_out(work):
        raise OutOfMemoryError(
            f"out of memory on {device} while {recipe.calibration_images:,} images calibrate the activation scales; "
            f"use fewer: --set calibration_images={max(recipe.calibration_images // 4, 2)}"
        )


def accuracy_on_test(model: nn.Module, data: Dataset, *, device: torch.device) -> tuple[int, int]:
    """(right, images) on the whole test part, unattacked; in eval mode."""
    model.eval()
    right = images = 0
    with bar("test", len(data.test)) as progress:
        for batch in data.test.batches(EVALUATION_BATCH, device=device):
            right += int(correct(model, batch.x, batch.y, batch_size=EVALUATION_BATCH).sum())
            images += len(batch.y)
            progress.advance(len(batch.y))
    return right, images
