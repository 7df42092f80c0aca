"""Attacking a model or a deployed file: accuracy under a suite of attacks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from robustq.data import Dataset
from robustq.data.splits import evenly_spaced
from robustq.errors import RobustqWarning, UsageError
from robustq.evaluation.adversarial_images import AdversarialImages, digest
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import check_radius, find_suite, run_suite
from robustq.evaluation.suites import Suite, without_gradients
from robustq.evaluation.target import Target
from robustq.export.runtimes.answers import RuntimeAnswers
from robustq.files import check_new, optional_path
from robustq.models.compiled import check_compiler
from robustq.progress import note
from robustq.recipe import format_epsilon, parse_epsilon
from robustq.workflow import Result
from robustq.workflow.open_file import twin_of_export
from robustq.workflow.open_model import (
    OpenedModel,
    answers_in_runtime,
    check_answers,
    open_attackable,
)
from robustq.workflow.prepared_target import prepared_target
from robustq.workflow.setup import data_for, log_evaluation, pick_device, radius_of, with_images
from robustq.workflow.surrogates import OtherNetworks

WORTH_COMPILING = 300.0
"""Seconds of an eager attack on a CPU that deserve the hint at --compile: compiling takes about a quarter of them and
saves a third or more in total (docs/results/training-cost.md)."""


@dataclass(frozen=True, eq=False)
class CurvePoint(Result):
    """Accuracy at a radius, with its 95% interval."""

    epsilon: float
    robust_accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class RobustnessResult(Result):
    """Result of attack."""

    FLAT = ("evaluation",)
    OPTIONAL = ("runtime",)

    model: Path | str  # the file or folder under attack; a name of a model in memory, of a module its class
    judge: str  # ``onnxruntime`` or another runtime, ``pytorch`` or ``callable``
    runtime: RuntimeAnswers | None = None  # of another runtime than onnxruntime
    label: str  # of the network, such as ``resnet20-w4a4``
    data: str
    suite: str
    seed: int
    file_failures: tuple[str, ...]  # failed checks of the file's export
    compiled: bool  # whether attack generation was
    evaluation: Evaluation  # counts, flags and verdict at the main radius
    curve: tuple[CurvePoint, ...]  # accuracies at all radii, smallest first; empty without ``epsilons``
    surrogates: tuple[str, ...]  # their names
    control: bool  # whether there was a natural control
    adversarial: Path | None  # file of the adversarial images, if they were to be saved and could be
    seconds: float


def attack_model(
    model: Path | str | nn.Module,
    *,
    suite: str = "standard",
    epsilon: float | str | None = None,
    epsilons: Sequence[float | str] = (),
    images: int = 1000,
    data: str | None = None,
    surrogates: Sequence[Path | str] = (),
    control: Path | str | None = None,
    train_surrogates: bool = True,
    save_adversarial: Path | str | None = None,
    custom_model: str | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
    compiled: bool = False,
    pixels: str | None = None,
    layout: str | None = None,
    runtime: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> RobustnessResult:
    """Attack a model with a suite of attacks, count the images that none of them breaks, and look for gradient masking.

    Adversarial images are rounded to uint8 pixels inside the ball before they count.

    Args:
        model: path of a model file of robustq (.pt, .safetensors), judged in PyTorch; of an export folder, whose .onnx
            onnxruntime judges, with the gradients of its model.pt; of any .onnx classifier alone, with the gradients of
            its twin (docs/twin.md); ``zoo:NAME``; or a torch.nn.Module that takes images in [0, 1], judged as it is
            (then ``data`` is needed).
        suite: ``"standard"``, ``"full"``, ``"paper"`` or ``"recheck"``.
        epsilon: radius in units of pixel / 255: a number in [0, 1] or a text such as ``"8/255"``; None: that of the
            model, else 8/255.
        epsilons: more radii, for an accuracy curve without masking checks.
        images: number of test images, evenly spaced; 0: all.
        data: data set: a known name (``"cifar10"``), a folder of images or an .npz file; None: the model's.
        surrogates: paths of model files of other networks, for transfer attacks.
        control: path of a model file of a naturally trained network on the same data; None: trained when it is first
            needed, and kept in ``runs/surrogates``.
        train_surrogates: make and train the networks that are needed; without them and without ``control`` there is no
            verdict.
        save_adversarial: path of the new .npz file for the adversarial images; None: not saved.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.
        resize: how images of a folder become square: ``"short-side"``, ``"short-side:PIXELS"`` or ``"squash"``; None:
            as for the model, else ``"short-side"``.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        compiled: compile attack generation (about 2 minutes first); the final count never uses compiled code.
        pixels: range in which a lone .onnx takes pixels: ``"unit"`` ([0, 1]), ``"uint8"`` (0 to 255), ``"imagenet"`` or
            ``"MEAN/STD"``; None: as the file says.
        layout: of a lone .onnx: ``"nchw"`` or ``"nhwc"``; None: as its shape says.
        runtime: that judges an export folder or an .onnx, such as ``"openvino"`` (docs/runtimes.md); the attacks that
            need no gradient ask it too. None: onnxruntime.
        seed: of everything random.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"`` for attack generation; None: a GPU if there is one.

    Returns:
        clean and robust accuracy as fractions with 95% intervals, accuracy after each attack, ``flags`` and
        ``verdict``.

    Raises:
        UsageError: an unknown suite or device, a runtime that is not installed, a radius out of range, or a file that
            does not say how it takes images.
        ModelFileError: the file cannot be read or attacked.
        DataError: data that are missing, broken or unfit for the model.
        OutputExistsError: ``save_adversarial`` exists.
        OutOfMemoryError: the images do not fit; a number that does is named.

    Warns:
        RobustqWarning: the adversarial images could not be written in the end; the result is returned all the same.
    """
    chosen = find_suite(suite)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    radii, wanted = [parse_epsilon(one) for one in epsilons], None if epsilon is None else parse_epsilon(epsilon)
    for one in [*radii, *([] if wanted is None else [wanted])]:
        check_radius(one)
    save_adversarial = optional_path(save_adversarial)
    if save_adversarial is not None:
        check_new(save_adversarial)
    place = pick_device(device)
    trains = train_surrogates and (chosen.checks_masking or chosen.transfers)
    opened = open_attackable(
        model,
        custom_model=custom_model,
        device=place,
        data=data,
        pixels=pixels,
        layout=layout,
        resize=resize,
        skip_bad_images=skip_bad_images,
        runtime=runtime,
    )
    if compiled and opened.network is None:
        raise UsageError(f"{opened.path}: --compile is for the network of a model.pt; leave it out")
    if compiled:
        check_compiler(place)  # before networks are trained for the attack
    loaded = data_for(opened.spec, data, opened.checkpoint, resize=resize, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    if opened.network is None:
        check_answers(opened, x, y)
    if opened.lack is not None:
        without_gradients(chosen, reason=opened.lack)  # refuses a suite of gradient attacks before networks are trained
        note(f"twin    none: {opened.lack}")
    in_runtime = answers_in_runtime(opened, x)
    radius = radius_of(opened.spec, wanted)
    log_evaluation(opened.spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    target = _add_networks(
        opened,
        OtherNetworks(loaded, custom_model, place),
        chosen,
        surrogates=[Path(path) for path in surrogates],
        control=None if control is None else Path(control),
        # At radius 0 there is no attack.
        train=trains and max([radius, *radii]) > 0.0,
    )
    notes = [] if opened.lack is None else [f"no gradients, and no attack with them: {opened.lack}"]
    if opened.network is not None and opened.deployed is not None:
        alone, notes = twin_of_export(opened.deployed, opened.spec, place)
        target = replace(target, file_alone=alone)
    if in_runtime is not None:
        notes = [in_runtime.sentence, *notes]
    start = time.perf_counter()
    with prepared_target(target, opened.differentiable, x, compiled=compiled) as prepared:
        fit = partial(with_images, model=opened.differentiable, images=x, device=place)
        found = fit(lambda: run_suite(prepared, x, y, suite=chosen, epsilon=radius, device=place, seed=seed))
        once, unchecked = replace(prepared, file_alone=None), replace(chosen, checks_masking=False)
        attack = partial(run_suite, once, x, y, suite=unchecked, device=place, seed=seed)
        curve = fit(lambda: _curve(attack, found, radii))
    seconds = time.perf_counter() - start
    if not compiled and place.type == "cpu" and seconds >= WORTH_COMPILING:  # on GPUs the gain was not measured
        note("note    such a long attack may take two thirds of the time with --compile, which needs a C++ compiler")
    result = RobustnessResult(
        model=opened.path if isinstance(model, nn.Module) else opened.path.absolute(),
        judge=opened.judge_name,
        runtime=in_runtime,
        label=opened.label,
        data=loaded.name,
        suite=suite,
        seed=seed,
        file_failures=tuple(opened.failures),
        compiled=compiled,
        evaluation=replace(found, notes=[*notes, *found.notes]),
        curve=curve,
        surrogates=tuple(target.surrogates),
        control=target.control is not None,
        adversarial=None,
        seconds=seconds,
    )
    if save_adversarial is None:
        return result
    try:
        saved = _adversarial_images(result, x, y, loaded).save(save_adversarial)
    except OSError as error:  # hours of work are not lost for it
        reason = error.strerror or error
        warnings.warn(f"{save_adversarial}: {reason}; the adversarial images are lost", RobustqWarning, stacklevel=2)
        return result
    return replace(result, adversarial=saved.absolute())


def _add_networks(
    opened: OpenedModel,
    networks: OtherNetworks,
    suite: Suite,
    *,
    surrogates: list[Path],
    control: Path | None,
    train: bool,
) -> Target:
    """The target with surrogates and control; those not given are made if ``train``."""
    others = {str(path): networks.load(path) for path in surrogates}
    natural = None if control is None else networks.load(control)
    if train and suite.transfers:
        others = others or networks.of_the_paper(opened.control_spec)
    elif train:
        others |= networks.requantized(opened)
        if natural is None:
            trained = networks.natural(opened.control_spec)
            others |= trained
            (natural,) = trained.values()
    return replace(opened.target(), surrogates=others, control=natural)


def _curve(attack: Callable[..., Evaluation], found: Evaluation, epsilons: Sequence[float]) -> tuple[CurvePoint, ...]:
    """Accuracies over radii, smallest first: an image broken in a ball is broken in every larger one."""
    points: list[CurvePoint] = []
    strongest: Evaluation | None = None  # of the smaller balls
    for epsilon in sorted({*epsilons, found.epsilon}) if epsilons else ():
        if epsilon == found.epsilon:
            here = found
        else:
            note(f"curve   epsilon {format_epsilon(epsilon)}")
            smaller = [one for one in (strongest, found) if one is not None and one.epsilon < epsilon]
            here = attack(epsilon=epsilon, known=min(smaller, key=lambda one: one.robust_accuracy, default=None))
        if strongest is None or here.robust_accuracy <= strongest.robust_accuracy:
            strongest = here
        points.append(CurvePoint(epsilon, here.robust_accuracy, here.interval))
    return tuple(points)


def _adversarial_images(result: RobustnessResult, x: Tensor, y: Tensor, data: Dataset) -> AdversarialImages:
    found = result.evaluation
    recorded = ("model", "judge", "label", "suite", "seed", "clean_accuracy", "robust_accuracy", "verdict")
    return AdversarialImages(
        x_adv=found.x_adv,
        labels=y,
        indices=evenly_spaced(len(data.test), len(x)),
        attack=found.found_by,
        broken=~found.robust,
        epsilon=found.epsilon,
        data=data.name,
        clean_sha256=digest(x, y),
        about={name: result[name] for name in recorded},
    )
