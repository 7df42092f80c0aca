"""One training run in its folder: calibration, training and result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robustq.data import Augment, Dataset, to_float
from robustq.errors import (
    NotFiniteError,
    OutputError,
    OutputExistsError,
    RunStoppedError,
)
from robustq.evaluation.accuracy import correct
from robustq.files import free_path
from robustq.hardening.forecast import fitting_setting
from robustq.hardening.methods.method import MethodContext
from robustq.hardening.methods.registry import build_method
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.monitor import Monitor
from robustq.hardening.run_folder import RUNS, RunFolder, remember_hardened
from robustq.hardening.state import StopRequest, restore
from robustq.hardening.trainer import Training
from robustq.memory import shrinking, within_memory
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec
from robustq.progress import bar, note
from robustq.recipe import Recipe
from robustq.workflow.job import Job, TrainResult
from robustq.workflow.run_log import check_forecast, log_run
from robustq.workflow.setup import augmentation, check_last_batch, radius_of
from robustq.workflow.teacher import open_teacher

EVALUATION_BATCH = 500

T = TypeVar("T")


def run_recipe(model: nn.Module, job: Job) -> TrainResult:
    """Train ``model`` by the job's recipe in a run folder, then count clean accuracy.

    From scratch the activation scales are calibrated first, with batch statistics, since the running ones are
    meaningless.

    Args:
        model: built from the job's ``spec``, on its device; left with the best epoch's weights, in eval mode.

    Raises:
        UsageError: TensorBoard is requested and not installed.
        OutOfMemoryError: names a batch size that fits; nothing is written.
        OutputError: the disk is full; saved states are kept.
        NotFiniteError: NaN or Inf; saved states are kept.
        RunStoppedError: by Ctrl-C or SIGTERM; names the command that resumes the run.
    """
    spec, data, recipe = job.spec, job.data, job.recipe
    augment = check_job(model, job)
    if job.source is None:
        calibrate_on(model, job, from_scratch=True)
    config = job.config(augment)
    training = prepare(model, spec, data, recipe, augment=augment, seed=job.seed, device=job.device)
    log_run(spec, data, training, config)
    check_forecast(training, parent=(RUNS if job.out is None else job.out.parent))
    return complete_run(_new_folder(job, config, training), training, spec, data)


def check_job(model: nn.Module, job: Job) -> Augment:
    """Check that a job can be trained; return its augmentation.

    Raises:
        RecipeError: the last batch has one image, or a crop may miss the image.
        UsageError: TensorBoard is requested and not installed.
    """
    check_last_batch(model, job.spec, len(job.data.train), job.recipe)
    if job.recipe.tensorboard:
        check_tensorboard()
    return augmentation(job.recipe, job.data)


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
    epsilon = radius_of(spec)

    def work() -> Training:
        context = MethodContext(
            model=model,
            epsilon=epsilon,
            batch_size=recipe.batch_size,
            image_shape=(spec.channels, spec.image_size, spec.image_size),
            classes=spec.classes,
            samples=len(data.train),
            epochs=recipe.epochs,
            device=device,
            generator=torch.Generator().manual_seed(seed),
            cross_entropy=nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
            teacher=open_teacher(recipe, data, augment=augment, device=device),
        )
        method = build_method(recipe, context)
        images, labels = data.holdout.take(recipe.monitor_images)
        monitor = Monitor(
            to_float(images.to(device)),
            labels.to(device),
            epsilon=epsilon if method.adversarial else None,
            batch_size=EVALUATION_BATCH,
            seed=seed,
        )
        return Training(model, method, data.train, monitor, recipe, augment=augment, seed=seed, device=device)

    return within_memory(
        work,
        lambda: (
            f"out of memory on {device} before the first batch; lower --set batch_size={recipe.batch_size} or "
            f"--set monitor_images={recipe.monitor_images}"
        ),
    )


def complete_run(folder: RunFolder, training: Training, spec: ModelSpec, data: Dataset) -> TrainResult:
    """Train from the state of ``training``, which ``folder`` holds already, to result.json; unlocks the folder.

    A run whose robust accuracy collapses ends early with the best epoch's weights and a failed check.

    Raises:
        OutOfMemoryError, OutputError, NotFiniteError, RunStoppedError: as :func:`run_recipe`.
    """
    command, recipe = folder.resume_command, training.recipe
    hardened = folder.config["command"] == "harden"

    def work() -> None:
        with StopRequest() as stop:
            training.run(folder, stop)

    def advice() -> str:
        return (
            f"out of memory in epoch {training.state.epoch + 1} with batches of {recipe.batch_size:,} on "
            f"{training.device}; {fitting_setting(training)}, as a new run; or free memory and resume: {command}"
        )

    with folder:
        note(f"stop    Ctrl-C saves the run. Resume it with: {command}")
        try:
            within_memory(work, advice)
            state, collapse = training.state, training.collapse
            assert state.best is not None  # a recipe has at least one epoch
            restore(training.model, state.best_weights)
            result = TrainResult.of(
                folder.path,
                spec,
                recipe,
                accuracy_on_test(training.model, data, device=training.device),
                hardened=hardened,
                epochs_done=state.epoch,
                best_epoch=state.best_epoch,
                holdout_clean_accuracy=state.best.clean,
                holdout_pgd10_accuracy=state.best.robust,
                seconds_per_epoch=state.seconds / state.epoch,
                size_bytes=(folder.path / "best.pt").stat().st_size,
                seed=training.seed,
                float_holdout_accuracy=(folder.config.get("source") or {}).get("float_accuracy"),
                collapsed=collapse,
                shortfalls=() if collapse is None else (f"{folder.path}: {collapse}",),
            )
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
    if hardened and training.method.settings.defends:
        remember_hardened(folder.path)  # export without a model takes this one
    return result


def _new_folder(job: Job, config: dict[str, Any], training: Training) -> RunFolder:
    while True:
        path = job.out or free_path(job.default_folder)
        try:
            return RunFolder.create(path, config, training.state_dict())
        except OutputExistsError:
            if job.out is not None:
                raise  # else another run has just taken the default name: try the next one
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; free space or name another place") from error


def calibrate_on(model: nn.Module, job: Job, *, from_scratch: bool) -> None:
    """Calibrate the activation scales of ``model`` on the recipe's number of unaugmented training images."""
    work = partial(calibrate, model, from_scratch=from_scratch)
    with_calibration_images(job, work, purpose="calibrate the activation scales")


def with_calibration_images(job: Job, work: Callable[[Tensor], T], *, purpose: str) -> T:
    """``work`` of the calibration images, float32 in [0, 1] on the job's device; OutOfMemoryError if too many."""
    wanted = job.recipe.calibration_images
    return within_memory(
        lambda: work(to_float(job.data.train.take(wanted)[0].to(job.device))),
        lambda: (
            f"out of memory on {job.device} while {wanted:,} images {purpose}; "
            f"use fewer: --set calibration_images={max(wanted // 4, 2)}"
        ),
    )


def accuracy_on_test(model: nn.Module, data: Dataset, *, device: torch.device) -> tuple[int, int]:
    """Correct answers and images of the whole test part, unattacked; sets eval mode."""
    model.eval()

    def count(at_once: int) -> tuple[int, int]:
        right = images = 0
        with bar("test", len(data.test)) as progress:
            for batch in data.test.batches(at_once, device=device):
                right += int(correct(model, batch.x, batch.y, batch_size=at_once).sum())
                images += len(batch.y)
                progress.advance(len(batch.y))
        return right, images

    return shrinking(count, EVALUATION_BATCH)
