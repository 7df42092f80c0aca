"""Attacking a model or a deployed file: accuracy under a suite of attacks.

Attacks change no weight, so that weights are quantized once. Compiled attack generation uses a copy of the network; the
judge of a model file stays eager.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robustq.data import Dataset, to_float
from robustq.data.splits import evenly_spaced
from robustq.errors import UsageError
from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.adversarial_images import AdversarialImages, digest
from robustq.evaluation.result import Evaluation
from robustq.evaluation.robust_accuracy import check_radius, find_suite, run_suite
from robustq.evaluation.suites import Suite
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.files import check_new
from robustq.models.compiled import MIN_IMAGES, CompiledNetwork, check_compiler
from robustq.models.quant.shared_weights import SharedWeights
from robustq.progress import note
from robustq.recipe import format_epsilon
from robustq.workflow import Result
from robustq.workflow.open_model import OpenedModel, open_attackable
from robustq.workflow.setup import data_for, log_evaluation, pick_device, radius_of
from robustq.workflow.surrogates import load_surrogates, natural_network, paper_surrogates, requantized_copies

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
    """Result of attack.

    Args:
        model: the file or folder under attack.
        judge: ``onnxruntime`` or ``pytorch``.
        label: of the network, such as ``resnet20-w4a4``.
        file_failures: failed checks of the file's export.
        compiled: whether attack generation was compiled.
        evaluation: counts, flags and verdict at the main radius.
        curve: accuracies at all radii, smallest first; empty without ``epsilons``.
        surrogates: their names.
        control: whether there was a natural control.
        adversarial: file of the adversarial images.
    """

    FLAT = ("evaluation",)

    model: Path
    judge: str
    label: str
    data: str
    suite: str
    seed: int
    file_failures: tuple[str, ...]
    compiled: bool
    evaluation: Evaluation
    curve: tuple[CurvePoint, ...]
    surrogates: tuple[str, ...]
    control: bool
    adversarial: Path | None
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
    own_model: str | None = None,
    skip_bad_images: bool = False,
    compiled: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> RobustnessResult:
    """Attack a model file, or the deployed file of an export folder.

    Args:
        model: a .pt of robustq, or an export folder: attack generation uses its model.pt, its .onnx is the judge.
        suite: a key of :data:`robustq.evaluation.suites.SUITES`.
        epsilon: radius; None: as the model was trained, else 8/255.
        epsilons: more radii for an accuracy curve, without masking checks.
        images: number of test images, evenly spaced; 0: all.
        data: overrides the model's.
        surrogates: model files of other networks for transfer attacks.
        control: model file of a naturally trained network on the same data; None: trained when it is first needed.
        train_surrogates: make and train the networks that are needed; without them and without ``control`` there is no
            verdict.
        save_adversarial: new .npz file for the adversarial images.
        own_model: the ``module:function`` that built the network, if it is a custom model; allows its code to run.
        skip_bad_images: skip image files that cannot be read, with a warning.
        compiled: compile attack generation; the final count never uses compiled code.
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
    opened = open_attackable(model, own_model=own_model, device=place)
    if compiled:
        check_compiler(place)  # before networks are trained for the attack
    loaded = data_for(opened.spec, data, opened.checkpoint, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    radius = radius_of(opened.spec, epsilon)
    log_evaluation(opened.spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    target = _add_networks(
        opened,
        loaded,
        chosen,
        surrogates=[Path(path) for path in surrogates],
        control=None if control is None else Path(control),
        # At radius 0 there is no attack.
        train=train_surrogates and (chosen.checks_masking or chosen.transfers) and max([radius, *epsilons]) > 0.0,
        own_model=own_model,
        device=place,
    )
    start = time.perf_counter()
    with prepared_target(target, opened.gradient_model, x, compiled=compiled) as prepared:
        found = run_suite(prepared, x, y, suite=chosen, epsilon=radius, device=place, seed=seed)
        curve = _curve(prepared, x, y, chosen, found, epsilons, device=place, seed=seed)
    seconds = time.perf_counter() - start
    if not compiled:
        suggest_compiling(seconds, place)
    result = RobustnessResult(
        model=opened.path.absolute(),
        judge=opened.judge_name,
        label=opened.spec.label,
        data=loaded.name,
        suite=suite,
        seed=seed,
        file_failures=tuple(opened.failures),
        compiled=compiled,
        evaluation=found,
        curve=curve,
        surrogates=tuple(target.surrogates),
        control=target.control is not None,
        adversarial=None,
        seconds=seconds,
    )
    if save_adversarial is None:
        return result
    saved = _adversarial_images(result, x, y, loaded).save(save_adversarial)
    return replace(result, adversarial=saved.absolute())


@contextmanager
def prepared_target(target: Target, network: nn.Module, images: Tensor, *, compiled: bool) -> Iterator[Target]:
    """Make the target's networks faster within the block, where they must not change.

    Args:
        network: the network under attack, in eval mode, on its device.
        images: uint8 (N, C, H, W), one or more of the images to attack.
        compiled: compile a copy of the network for the target's ``sources``, and for gradient-free attacks on a
            PyTorch judge.

    Yields:
        The target to attack.
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
            target = _compiled(target, copied, judged=target.judge is network)
        yield target


def suggest_compiling(seconds: float, device: torch.device) -> None:
    """Print the hint at --compile after a long eager attack; on GPUs its gain was not measured."""
    if device.type == "cpu" and seconds >= WORTH_COMPILING:
        note("note    such a long attack may take two thirds of the time with --compile, which needs a C++ compiler")


def _compiled(target: Target, network: nn.Module, *, judged: bool) -> Target:
    fast = CompiledNetwork(network)
    sources = {name: fast if name == AS_TRAINED else fast.under_rule(name) for name in target.gradient_models}
    return replace(target, gradient_models=sources, proxy=fast if judged else None)


def _convolve_codes(network: nn.Module, images: Tensor, stack: ExitStack) -> None:
    device = next(network.parameters()).device
    # Only here: it makes an operator known to torch, which takes a moment.
    from robustq.models.quant.integer_convolution import IntegerConvolutions, is_available

    if device.type == "cpu" and is_available():
        integers = IntegerConvolutions(network, to_float(images[:2]), way_back=torch.float32)
        stack.enter_context(integers.in_place())


def _add_networks(
    opened: OpenedModel,
    data: Dataset,
    suite: Suite,
    *,
    surrogates: list[Path],
    control: Path | None,
    train: bool,
    own_model: str | None,
    device: torch.device,
) -> Target:
    """The target with surrogates and control; those not given are made if ``train``."""
    others = load_surrogates(surrogates, data, own_model=own_model, device=device)
    natural = None
    if control is not None:
        (natural,) = load_surrogates([control], data, own_model=own_model, device=device).values()
    if train and suite.transfers:
        others |= {} if others else paper_surrogates(opened.spec, data, own_model=own_model, device=device)
    elif train:
        others |= requantized_copies(opened, data, own_model=own_model, device=device)
        if natural is None:
            trained = natural_network(opened.spec, data, own_model=own_model, device=device)
            others |= trained
            (natural,) = trained.values()
    return replace(opened.target(), surrogates=others, control=natural)


def _curve(
    target: Target,
    x: Tensor,
    y: Tensor,
    suite: Suite,
    found: Evaluation,
    epsilons: Sequence[float],
    *,
    device: torch.device,
    seed: int,
) -> tuple[CurvePoint, ...]:
    """Accuracies over radii, smallest first: an image broken in a ball is broken in every larger one."""
    points: list[CurvePoint] = []
    strongest: Evaluation | None = None  # of the smaller balls
    plain = replace(suite, checks_masking=False)
    for epsilon in sorted({*epsilons, found.epsilon}) if epsilons else ():
        if epsilon == found.epsilon:
            here = found
        else:
            note(f"curve   epsilon {format_epsilon(epsilon)}")
            smaller = [one for one in (strongest, found) if one is not None and one.epsilon < epsilon]
            known = min(smaller, key=lambda one: one.robust_accuracy, default=None)
            here = run_suite(target, x, y, suite=plain, epsilon=epsilon, device=device, seed=seed, known=known)
        if strongest is None or here.robust_accuracy <= strongest.robust_accuracy:
            strongest = here
        interval = wilson_interval(int(here.robust.sum()), here.images)
        points.append(CurvePoint(epsilon, here.robust_accuracy, interval))
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
