"""Attacking a model or a deployed file: accuracy under a suite of attacks.

Attacks change no weight, so that weights are quantized once. Compiled attack generation uses a copy of the network; the
judge of a model file stays eager.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from robustq.data import Dataset, to_float
from robustq.data.splits import evenly_spaced
from robustq.errors import RobustqWarning, UsageError
from robustq.evaluation.adversarial_images import AdversarialImages, digest
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import check_radius, find_suite, run_suite
from robustq.evaluation.suites import Suite, without_gradients
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.files import check_new
from robustq.models.compiled import MIN_IMAGES, CompiledNetwork, check_compiler
from robustq.models.quant.shared_weights import SharedWeights
from robustq.progress import note
from robustq.recipe import format_epsilon
from robustq.workflow import Result
from robustq.workflow.open_file import twin_of_export
from robustq.workflow.open_model import OpenedModel, check_answers, open_attackable
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

    model: Path | str  # the file or folder under attack; a name of a model in memory
    judge: str  # ``onnxruntime``, ``pytorch`` or ``callable``
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
    model: Path | str,
    *,
    suite: str = "standard",
    epsilon: float | None = None,
    epsilons: Sequence[float] = (),
    images: int = 1000,
    data: str | None = None,
    surrogates: Sequence[Path | str] = (),
    control: Path | str | None = None,
    train_surrogates: bool = True,
    save_adversarial: Path | None = None,
    custom_model: str | None = None,
    skip_bad_images: bool = False,
    compiled: bool = False,
    pixels: str | None = None,
    layout: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> RobustnessResult:
    """Attack a model file, the deployed file of an export folder, or any .onnx classifier of images.

    Args:
        model: a .pt of robustq, or an export folder: attack generation uses its model.pt, its .onnx is the judge. Or an
            .onnx alone, which onnxruntime judges, and whose differentiable twin (docs/twin.md) gives the gradients.
        suite: a key of :data:`robustq.evaluation.suites.SUITES`.
        epsilon: radius; None: as the model was trained, else 8/255.
        epsilons: more radii for an accuracy curve, without masking checks.
        images: number of test images, evenly spaced; 0: all.
        data: overrides the model's.
        surrogates: model files of other networks for transfer attacks.
        control: model file of a naturally trained network on the same data; None: trained when it is first needed.
        train_surrogates: make and train the networks that are needed; without them and without ``control`` there is no
            verdict.
        save_adversarial: new .npz file for the adversarial images; a warning if it cannot be written in the end.
        custom_model: the ``module:function`` that built the network, if it is a custom model; allows its code to run.
        skip_bad_images: skip image files that cannot be read, with a warning.
        compiled: compile attack generation; the final count never uses compiled code. Not of a lone .onnx.
        pixels: range in which a lone .onnx takes pixels: ``unit`` ([0, 1]), ``uint8`` (0 to 255), ``imagenet`` or
            ``MEAN/STD``; None: as the file says.
        layout: of a lone .onnx, ``nchw`` or ``nhwc``; None: as its shape says.
        seed: of everything random.
        device: ``cpu``, ``cuda``; None: a GPU if there is one.

    Raises:
        RobustqError: bad input.
    """
    chosen = find_suite(suite)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    for one in [*epsilons, *([] if epsilon is None else [epsilon])]:
        check_radius(one)
    if save_adversarial is not None:
        check_new(save_adversarial)
    place = pick_device(device)
    trains = train_surrogates and (chosen.checks_masking or chosen.transfers)
    opened = open_attackable(model, custom_model=custom_model, device=place, data=data, pixels=pixels, layout=layout)
    if compiled and opened.network is None:
        raise UsageError(f"{opened.path}: --compile is for the network of a model.pt; leave it out")
    if compiled:
        check_compiler(place)  # before networks are trained for the attack
    loaded = data_for(opened.spec, data, opened.checkpoint, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    if opened.network is None:
        check_answers(opened, x, y)
    if opened.lack is not None:
        without_gradients(chosen, reason=opened.lack)  # refuses a suite of gradient attacks before networks are trained
        note(f"twin    none: {opened.lack}")
    radius = radius_of(opened.spec, epsilon)
    log_evaluation(opened.spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    target = _add_networks(
        opened,
        OtherNetworks(loaded, custom_model, place),
        chosen,
        surrogates=[Path(path) for path in surrogates],
        control=None if control is None else Path(control),
        # At radius 0 there is no attack.
        train=trains and max([radius, *epsilons]) > 0.0,
    )
    notes = [] if opened.lack is None else [f"no gradients, and no attack with them: {opened.lack}"]
    if opened.network is not None and opened.deployed is not None:
        alone, notes = twin_of_export(opened.deployed, opened.spec, place)
        target = replace(target, file_alone=alone)
    start = time.perf_counter()
    with prepared_target(target, opened.differentiable, x, compiled=compiled) as prepared:
        fit = partial(with_images, model=opened.differentiable, images=x, device=place)
        found = fit(lambda: run_suite(prepared, x, y, suite=chosen, epsilon=radius, device=place, seed=seed))
        once, unchecked = replace(prepared, file_alone=None), replace(chosen, checks_masking=False)
        attack = partial(run_suite, once, x, y, suite=unchecked, device=place, seed=seed)
        curve = fit(lambda: _curve(attack, found, epsilons))
    seconds = time.perf_counter() - start
    if not compiled and place.type == "cpu" and seconds >= WORTH_COMPILING:  # on GPUs the gain was not measured
        note("note    such a long attack may take two thirds of the time with --compile, which needs a C++ compiler")
    result = RobustnessResult(
        model=opened.path.absolute(),
        judge=opened.judge_name,
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


@contextmanager
def prepared_target(target: Target, network: nn.Module | None, images: Tensor, *, compiled: bool) -> Iterator[Target]:
    """Yield the target with faster networks, which must not change within the block.

    Args:
        network: the network under attack, in eval mode, on its device; None where only its answers are known.
        images: uint8 (N, C, H, W), one or more of the images to attack.
        compiled: compile a copy of the network for the target's gradient models, and for gradient-free attacks on a
            PyTorch judge.
    """
    copied = deepcopy(network) if compiled else None
    others = [*target.surrogates.values(), *([] if target.control is None else [target.control])]
    with ExitStack() as stack:
        for one in {id(one): one for one in (network, copied, *others) if isinstance(one, nn.Module)}.values():
            stack.enter_context(SharedWeights(one).quantized_once())
        if copied is not None:
            if len(images) >= MIN_IMAGES:
                kinds = len(target.gradient_models) + 1
                note(f"note    {kinds} kinds of passes are compiled at their first use, about half a minute each")
            _convolve_codes(copied, images, stack)
            fast = CompiledNetwork(copied)
            rules = {name: fast if name == AS_TRAINED else fast.under_rule(name) for name in target.gradient_models}
            target = replace(target, gradient_models=rules, proxy=fast if target.judge is network else None)
        yield target


def _convolve_codes(network: nn.Module, images: Tensor, stack: ExitStack) -> None:
    device = next(network.parameters()).device
    # Only here: it makes an operator known to torch, which takes a moment.
    from robustq.models.quant.integer_convolution import IntegerConvolutions, is_available

    if device.type == "cpu" and is_available():
        integers = IntegerConvolutions(network, to_float(images[:2]), way_back=torch.float32)
        stack.enter_context(integers.in_place())


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
