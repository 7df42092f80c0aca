"""One training run in its folder: teacher, calibration, training and result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robustq.checkpoint import load_model
from robustq.data import NO_AUGMENT, Augment, Dataset, to_float
from robustq.errors import (
    DataError,
    ModelFileError,
    NotFiniteError,
    OutputError,
    OutputExistsError,
    RunStoppedError,
    UsageError,
)
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.files import check_model_file, free_path
from robustq.hardening.forecast import fitting_setting
from robustq.hardening.methods.method import MethodContext, Teacher
from robustq.hardening.methods.registry import SETTINGS, build_method, resolved_settings
from robustq.hardening.methods.rslad import CachedTeacher, OnlineTeacher
from robustq.hardening.metrics import check_tensorboard
from robustq.hardening.monitor import Collapse, Monitor
from robustq.hardening.run_folder import RUNS, RunFolder, remember_hardened
from robustq.hardening.state import StopRequest, restore
from robustq.hardening.trainer import Training
from robustq.memory import shrinking, within_memory
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec
from robustq.progress import bar, note
from robustq.recipe import Recipe, format_epsilon
from robustq.seals import sha256
from robustq.workflow import Result
from robustq.workflow.run_log import check_forecast, log_run
from robustq.workflow.setup import augmentation, check_fit, check_last_batch, radius_of, versions

EVALUATION_BATCH = 500

T = TypeVar("T")


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


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of a run, checked and loaded."""

    spec: ModelSpec
    data: Dataset
    recipe: Recipe
    seed: int  # of order, augmentation and the method's draws
    device: torch.device
    out: Path | None  # run folder, checked to be free; None: ``runs/<label>-<method>``
    source: Path | None  # the model file that is fine-tuned; None: from scratch
    float_accuracy: float | None = None  # of the float network in that file, on held-out images
    skip_bad_images: bool = False  # how the data were loaded, for a later resume

    @property
    def default_folder(self) -> Path:
        """The run folder without ``out``."""
        return RUNS / f"{self.spec.label}-{self.recipe.method}"

    def config(self, augment: Augment | None = None) -> dict[str, Any]:
        """The content of config.json."""
        source, data = self.source, self.data
        return {
            "command": "train" if source is None else "harden",
            "recipe": {**self.recipe.to_dict(), "settings": resolved_settings(self.recipe)},
            "source": None
            if source is None
            else {"path": str(source.absolute()), "sha256": sha256(source), "float_accuracy": self.float_accuracy},
            "spec": self.spec.to_dict(),
            "data": {"name": data.name, "digest": data.digest(), "skip_bad_images": self.skip_bad_images},
            **({} if augment is None else {"augment": asdict(augment)}),
            "seed": self.seed,
            "device": str(self.device),
            "versions": versions(),
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainResult(Result):
    """Result of train and harden, and the content of result.json.

    Accuracies of the hold-out are those of the best epoch; None: not measured.
    """

    OPTIONAL = ("seconds", "float_holdout_accuracy", "bits", "method")

    checkpoint: Path  # the best epoch's model file, in the run folder
    run: Path
    model: str  # label of the network, such as ``resnet20-w4a4``
    recipe: str
    clean_accuracy: float  # on the test images
    clean_interval: tuple[float, float]  # 95%
    test_images: int
    epochs: int  # planned
    epochs_done: int = 0
    best_epoch: int = 0  # that of the checkpoint
    holdout_clean_accuracy: float
    holdout_pgd10_accuracy: float | None = None
    seconds_per_epoch: float = 0.0
    seconds: float | None = None  # of post-training quantization
    size_bytes: int
    epsilon: float | None
    seed: int
    collapsed: Collapse | None = None  # the collapse of robust accuracy that ended the run
    shortfalls: tuple[str, ...] = ()  # failed checks, in words
    float_holdout_accuracy: float | None = None  # of the float network that harden was given
    bits: int | None = None  # of harden, as the next
    method: str | None = None

    @classmethod
    def of(
        cls, run: Path, spec: ModelSpec, recipe: Recipe, answers: tuple[int, int], *, hardened: bool, **others: Any
    ) -> TrainResult:
        """The result of a run of ``recipe`` in the folder ``run``; ``answers``: see :func:`accuracy_on_test`."""
        run, (right, count) = run.absolute(), answers
        return cls(
            checkpoint=run / "best.pt",
            run=run,
            model=spec.label,
            recipe=recipe.name,
            clean_accuracy=right / count,
            clean_interval=wilson_interval(right, count),
            test_images=count,
            epochs=recipe.epochs,
            epsilon=spec.epsilon,
            bits=spec.weight_bits if hardened else None,
            method=recipe.method if hardened else None,
            **others,
        )


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
    """The augmentation of a job that can be trained.

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
            samples=len(data.train),
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
