"""One training run in its folder: teacher, calibration, training and result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from robustq.hardening.diagnosis import runs_out_of_memory
from robustq.hardening.forecast import fitting_setting
from robustq.hardening.methods.method import Teacher
from robustq.hardening.methods.registry import SETTINGS, build_method, resolved_settings
from robustq.hardening.methods.rslad import CachedTeacher, OnlineTeacher
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.monitor import Collapse, Monitor
from robustq.hardening.run_folder import RUNS, RunFolder, remember_hardened
from robustq.hardening.state import StopRequest, restore
from robustq.hardening.trainer import Training, TrainingSummary
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec
from robustq.progress import bar, note
from robustq.recipe import Recipe, format_epsilon
from robustq.recipe.schema import DEFAULT_EPSILON
from robustq.workflow import Result
from robustq.workflow.run_log import check_forecast, log_resume_command, log_run
from robustq.workflow.setup import augmentation, check_fit, check_last_batch, versions

EVALUATION_BATCH = 500


def with_absolute_teacher(recipe: Recipe) -> Recipe:
    """``recipe`` with an absolute path of its teacher, if it has one, so that a run can be resumed from any folder.

    Raises:
        UsageError: it names no teacher.
        ModelFileError: the file is missing or empty.
    """
    if not SETTINGS[recipe.method].needs_teacher:
        return recipe
    path = str(resolved_settings(recipe)["teacher"])
    if not path:
        raise UsageError(
            f"recipe {recipe.name} needs a robust teacher; add --set {recipe.method}.teacher=FILE, a model file of "
            "robustq with the same classes"
        )
    _check_teacher(path)
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
    path = _check_teacher(str(settings["teacher"]))
    try:
        network, spec, _ = load_model(path)
        check_fit(spec, data, path)
    except (ModelFileError, DataError) as error:
        raise type(error)(f"rslad.teacher: {error}") from error
    if spec.class_names and data.class_names and tuple(spec.class_names) != tuple(data.class_names):
        pairs = enumerate(zip(spec.class_names, data.class_names, strict=True))
        first = next(index for index, (ours, theirs) in pairs if ours != theirs)
        raise DataError(
            f"rslad.teacher: {path} calls class {first} '{spec.class_names[first]}', {data.name} calls it "
            f"'{data.class_names[first]}'; give a teacher of the same classes in the same order"
        )
    radius = "trained without a defence" if spec.epsilon is None else f"epsilon {format_epsilon(spec.epsilon)}"
    note(f"teacher {spec.label} ({radius}), {path}")
    network = network.to(device)
    if settings["teacher_sees"] == "augmented" and augment != NO_AUGMENT:
        return OnlineTeacher(network)
    return CachedTeacher(network, data.train, mirrored=augment.flip, device=device)


def _check_teacher(path: str) -> Path:
    try:
        return check_model_file(Path(path))
    except ModelFileError as error:
        raise ModelFileError(f"rslad.teacher: {error}") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainResult(Result):
    """Result of train and harden, and the content of result.json.

    Args:
        checkpoint: the best epoch's model file, in the run folder ``run``.
        model: label of the network, such as ``resnet20-w4a4``.
        clean_accuracy, clean_interval, test_images: on the test images, with the 95% interval.
        epochs, epochs_done, best_epoch: planned, trained, and that of ``checkpoint``.
        holdout_clean_accuracy, holdout_pgd10_accuracy: of the best epoch, on held-out images; None: not measured.
        seconds: of post-training quantization.
        collapsed: the collapse of robust accuracy that ended the run.
        shortfalls: failed checks, in words.
        bits, method: of harden.
    """

    OPTIONAL = ("seconds", "bits", "method")

    checkpoint: Path
    run: Path
    model: str
    recipe: str
    clean_accuracy: float
    clean_interval: tuple[float, float]
    test_images: int
    epochs: int
    epochs_done: int
    best_epoch: int
    holdout_clean_accuracy: float
    holdout_pgd10_accuracy: float | None
    seconds_per_epoch: float
    seconds: float | None = None
    size_bytes: int
    epsilon: float | None
    seed: int
    collapsed: Collapse | None = None
    shortfalls: tuple[str, ...] = ()
    bits: int | None = None
    method: str | None = None


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
) -> TrainResult:
    """Train ``model`` by ``recipe`` in a run folder, then count clean accuracy.

    Args:
        model: built from ``spec``, on ``device``; left with the best epoch's weights, in eval mode.
        spec, data, recipe: network, images and settings.
        seed: of order, augmentation and the method's draws.
        device: of the training.
        out: run folder, checked to be free; None: ``runs/<label>-<method>``.
        source: the model file that is fine-tuned. None: from scratch; the activation scales are then calibrated first,
            with batch statistics, since the running ones are meaningless.
        skip_bad_images: how ``data`` was loaded, for a later resume.

    Raises:
        UsageError: TensorBoard is requested and not installed.
        OutOfMemoryError: names a batch size that fits; nothing is written.
        OutputError: the disk is full; saved states are kept.
        NotFiniteError: NaN or Inf; saved states are kept.
        RunStoppedError: by Ctrl-C or SIGTERM; names the command that resumes the run.
    """
    check_last_batch(model, spec, len(data.train), recipe)
    if recipe.tensorboard:
        check_tensorboard()
    if source is None:
        calibrate_on(model, data, recipe, device=device, from_scratch=True)
    augment = augmentation(recipe, data)
    config = run_config(
        spec, data, recipe, seed=seed, device=device, source=source, skip_bad_images=skip_bad_images, augment=augment
    )
    training = prepare(model, spec, data, recipe, augment=augment, seed=seed, device=device)
    log_run(spec, data, training, config)
    check_forecast(training, parent=(RUNS if out is None else out.parent))
    folder = _new_folder(out, RUNS / f"{spec.label}-{recipe.method}", config, training)
    return complete_run(folder, training, spec, data)


def run_config(
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    source: Path | None,
    skip_bad_images: bool,
    augment: Augment | None = None,
) -> dict[str, Any]:
    """The content of config.json; arguments as :func:`run_recipe`."""
    return {
        "command": "train" if source is None else "harden",
        "recipe": {**recipe.to_dict(), "settings": resolved_settings(recipe)},
        "source": None if source is None else {"path": str(source.absolute()), "sha256": sha256(source)},
        "spec": spec.to_dict(),
        "data": {"name": data.name, "digest": data.digest(), "skip_bad_images": skip_bad_images},
        **({} if augment is None else {"augment": asdict(augment)}),
        "seed": seed,
        "device": str(device),
        "versions": versions(),
    }


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
    """Set up a training.

    Raises:
        OutOfMemoryError: the method's own tensors (the perturbation set of ODG-Q) or the data do not fit.
        RobustqError: the recipe's teacher cannot be used.
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

    if runs_out_of_memory(work):
        raise OutOfMemoryError(
            f"out of memory on {device} before the first batch; lower --set batch_size={recipe.batch_size} or "
            f"--set monitor_images={recipe.monitor_images}"
        )
    return prepared[0]


def complete_run(folder: RunFolder, training: Training, spec: ModelSpec, data: Dataset) -> TrainResult:
    """Train from the state of ``training``, which ``folder`` holds already, to result.json; unlocks the folder.

    A run whose robust accuracy collapses ends early with the best epoch's weights and a failed check.

    Raises:
        OutOfMemoryError, OutputError, NotFiniteError, RunStoppedError: as :func:`run_recipe`.
    """
    command = folder.resume_command
    outcome: list[TrainingSummary] = []
    with folder:
        log_resume_command(folder)
        try:
            with StopRequest() as stop:
                out_of_memory = runs_out_of_memory(lambda: outcome.append(training.run(folder, stop)))
            if out_of_memory:
                raise OutOfMemoryError(
                    f"out of memory in epoch {training.state.epoch + 1} with batches of "
                    f"{training.recipe.batch_size:,} on {training.device}; {fitting_setting(training)}, as a new run; "
                    f"or free memory and resume: {command}"
                )
            restore(training.model, training.state.best_weights)
            correct, images = accuracy_on_test(training.model, data, device=training.device)
            result = _result(folder, spec, training, outcome[0], correct, images)
            folder.finish(result.to_dict())
        except RunStoppedError as error:
            raise RunStoppedError(f"{error}; resume with: {command}") from error
        except KeyboardInterrupt as error:
            if folder.finished:
                raise RunStoppedError(f"stopped, but the run has finished: {folder.path / 'best.pt'}") from error
            raise RunStoppedError(f"stopped at once; saved: {folder.progress()}; resume with: {command}") from error
        except NotFiniteError as error:
            raise NotFiniteError(f"{folder.path}: {error}") from error
        except OSError as error:
            raise OutputError(
                f"{error.filename or folder.path}: {error.strerror or error}; saved states are kept: free space, "
                f"then {command}"
            ) from error
    if folder.config["command"] == "harden" and training.method.settings.defends:
        remember_hardened(folder.path)  # export without a model takes this one
    return result


def _new_folder(out: Path | None, default: Path, config: dict[str, Any], training: Training) -> RunFolder:
    while True:
        path = out or free_path(default)
        try:
            return RunFolder.create(path, config, training.state_dict())
        except OutputExistsError:
            if out is not None:
                raise  # else another run has just taken the default name: try the next one
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; free space or name another place") from error


def _result(
    folder: RunFolder, spec: ModelSpec, training: Training, trained: TrainingSummary, correct: int, images: int
) -> TrainResult:
    checkpoint = folder.path.absolute() / "best.pt"
    hardened = folder.config["command"] == "harden"
    return TrainResult(
        checkpoint=checkpoint,
        run=checkpoint.parent,
        model=spec.label,
        recipe=training.recipe.name,
        clean_accuracy=correct / images,
        clean_interval=wilson_interval(correct, images),
        test_images=images,
        epochs=training.recipe.epochs,
        epochs_done=training.state.epoch,
        best_epoch=trained.best_epoch,
        holdout_clean_accuracy=trained.best.clean,
        holdout_pgd10_accuracy=trained.best.robust,
        seconds_per_epoch=trained.seconds_per_epoch,
        size_bytes=checkpoint.stat().st_size,
        epsilon=spec.epsilon,
        seed=training.seed,
        collapsed=trained.collapse,
        shortfalls=() if trained.collapse is None else (f"{folder.path}: {trained.collapse}",),
        bits=spec.weight_bits if hardened else None,
        method=training.recipe.method if hardened else None,
    )


def calibrate_on(model: nn.Module, data: Dataset, recipe: Recipe, *, device: torch.device, from_scratch: bool) -> None:
    """Calibrate the activation scales of ``model`` on the recipe's number of unaugmented training images.

    Raises:
        OutOfMemoryError: so many images do not fit at once.
    """

    def work() -> None:
        images, _ = data.train.take(recipe.calibration_images)
        calibrate(model, to_float(images.to(device)), from_scratch=from_scratch)

    if runs_out_of_memory(work):
        raise OutOfMemoryError(
            f"out of memory on {device} while {recipe.calibration_images:,} images calibrate the activation scales; "
            f"use fewer: --set calibration_images={max(recipe.calibration_images // 4, 2)}"
        )


def accuracy_on_test(model: nn.Module, data: Dataset, *, device: torch.device) -> tuple[int, int]:
    """Correct answers and images of the whole test part, unattacked; sets eval mode."""
    model.eval()
    right = images = 0
    with bar("test", len(data.test)) as progress:
        for batch in data.test.batches(EVALUATION_BATCH, device=device):
            right += int(correct(model, batch.x, batch.y, batch_size=EVALUATION_BATCH).sum())
            images += len(batch.y)
            progress.advance(len(batch.y))
    return right, images
