"""Attacking a model or a deployed file.

The networks that attacks find their images on, made ready for thousands of passes each.

No attack changes a weight, so that weights are quantized once. Compiled, the network under attack is a copy of its own:
the judge of a model file stays as it is written. Its convolutions of codes are exact sums, which is what a float32
convolution rounds and what the deployed file computes; on the way back they stay in float32.

attack: how many images a model still gets right when somebody tries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from robustq.models.compiled import FEWEST, CompiledNetwork, check_compiler
from robustq.models.quant.weights_once import SharedWeights
from robustq.progress import note
from robustq.recipe import format_epsilon
from robustq.workflow.open_model import Opened, open_attackable
from robustq.workflow.setup import DEFAULT_EPSILON, data_for, pick_device, tell_evaluation
from robustq.workflow.surrogates import given, of_the_paper, twins, undefended

WORTH_COMPILING = 300.0
"""Seconds of an attack on a CPU that was not compiled, of which compiling would have been a quarter, and all in all
saved a third and more where it was measured (docs/results/training-cost.md)."""


@contextmanager
def crafted_fast(target: Target, source: nn.Module, images: Tensor, *, compiled: bool) -> Iterator[Target]:
    """Within it the target's networks must stay as they are, and answer faster.

    Args:
        target: of ``source``.
        source: the network under attack, in eval mode, on its device.
        images: uint8 (N, C, H, W), one or more of those that will be attacked.
        compiled: compile the passes through a copy of the network: all that the target's ``sources`` answer, and what
            attacks without gradient ask of a PyTorch judge.

    Yields:
        The target to attack.
    """
    copied = deepcopy(source) if compiled else None
    others = [*target.surrogates.values(), *([] if target.control is None else [target.control])]
    with ExitStack() as stack:
        for network in {id(one): one for one in (source, copied, *others) if isinstance(one, nn.Module)}.values():
            stack.enter_context(SharedWeights(network).quantized_once())
        if copied is not None:
            if len(images) >= FEWEST:
                kinds = len(target.gradient_models) + 1
                note(f"note    {kinds} kinds of passes compile when first asked for, in half a minute or so each")
            _convolve_codes(copied, images, stack)
            target = _compiled(target, copied, judged=target.judge is source)
        yield target


def tell_what_compiling_saves(seconds: float, device: torch.device) -> None:
    """One line, after an attack that was not compiled and so long that its like should be; nothing where nothing is
    known, as of GPUs.
    """
    if device.type == "cpu" and seconds >= WORTH_COMPILING:
        note("note    so long an attack may take two thirds of the time with --compile, which takes a C++ compiler")


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
) -> dict[str, Any]:
    """Attack a model file, or the deployed file of an export folder.

    Args:
        model: a .pt that robustq wrote, or an export folder (attacks are then found on its model.pt and counted on its
            .onnx).
        suite: a key of :data:`robustq.evaluation.suites.SUITES`.
        epsilon: radius; None: what the model was trained for, else 8/255.
        epsilons: more radii for an accuracy curve; the flags are looked for at ``epsilon`` alone.
        images: test images to use (evenly spaced; 0: all).
        data: over what the model says.
        surrogates: model files of other networks for the same task, to transfer from.
        control: model file of a naturally trained network on the same data; None: trained when it is needed first.
        train_surrogates: whether networks that are needed may be made and trained; without them only those that are
            given are used, and without a control no verdict is given.
        save_adversarial: new .npz file for the adversarial images.
        own_model: the ``module:function`` that built the network, where it is the user's own; without it the code is
            not run.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        compiled: find the images with compiled passes; what counts them is not compiled.
        seed: of everything random.
        device: ``cpu``, ``cuda``; None: a GPU where there is one.

    Returns:
        The keys of ``robustq attack --json``.

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
        check_compiler(place)  # before other networks are trained for the attack
    loaded = data_for(opened.spec, data, opened.checkpoint, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    spec_epsilon = DEFAULT_EPSILON if opened.spec.epsilon is None else opened.spec.epsilon
    radius = spec_epsilon if epsilon is None else epsilon
    tell_evaluation(opened.spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    target = _with_other_networks(
        opened,
        loaded,
        chosen,
        surrogates=[Path(path) for path in surrogates],
        control=None if control is None else Path(control),
        # Nothing is attacked in a ball of radius 0.
        make=train_surrogates and (chosen.checks_masking or chosen.transfers) and max([radius, *epsilons]) > 0.0,
        own_model=own_model,
        device=place,
    )
    start = time.perf_counter()
    with crafted_fast(target, opened.source, x, compiled=compiled) as fast:
        found = run_suite(fast, x, y, suite=chosen, epsilon=radius, device=place, seed=seed)
        curve = _curve(fast, x, y, chosen, found, epsilons, device=place, seed=seed)
    seconds = time.perf_counter() - start
    if not compiled:
        tell_what_compiling_saves(seconds, place)
    result = {
        "model": str(opened.path.absolute()),
        "judge": "onnxruntime" if opened.deployed is not None else "pytorch",
        "label": opened.spec.label,
        "data": loaded.name,
        "suite": suite,
        "seed": seed,
        "file_failures": opened.failures,
        "compiled": compiled,
        **found.to_dict(),
        "curve": curve,
        "surrogates": list(target.surrogates),
        "control": target.control is not None,
        "adversarial": None,
        "seconds": seconds,
    }
    if save_adversarial is not None:
        _pictures(found, x, y, loaded, result).save(save_adversarial)
        result["adversarial"] = str(save_adversarial.absolute())
    return result


def _with_other_networks(
    opened: Opened,
    data: Dataset,
    suite: Suite,
    *,
    surrogates: list[Path],
    control: Path | None,
    make: bool,
    own_model: str | None,
    device: torch.device,
) -> Target:
    """The target with surrogates and control, made where they may be."""
    target = opened.target()
    others = given(surrogates, data, own_model=own_model, device=device)
    undefended_one = None
    if control is not None:
        (undefended_one,) = given([control], data, own_model=own_model, device=device).values()
    if make and suite.transfers:
        others |= {} if others else of_the_paper(opened.spec, data, own_model=own_model, device=device)
    elif make:
        others |= twins(opened, data, own_model=own_model, device=device)
        if undefended_one is None:
            trained = undefended(opened.spec, data, own_model=own_model, device=device)
            others |= trained
            (undefended_one,) = trained.values()
    return replace(target, surrogates=others, control=undefended_one)


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
) -> list[dict[str, Any]]:
    """Accuracies over radii, smallest first: what breaks an image in a ball breaks it in every larger one."""
    points, known = [], None
    plain = replace(suite, checks_masking=False)
    for epsilon in sorted({*epsilons, found.epsilon}) if epsilons else ():
        if epsilon == found.epsilon:
            here = found
        else:
            note(f"curve   epsilon {format_epsilon(epsilon)}")
            here = run_suite(
                target,
                x,
                y,
                suite=plain,
                epsilon=epsilon,
                device=device,
                seed=seed,
                known=_worse(known, found, epsilon),
            )
        known = here if known is None or here.robust_accuracy <= known.robust_accuracy else known
        right = int(here.robust.sum())
        points.append(
            {
                "epsilon": epsilon,
                "robust_accuracy": here.robust_accuracy,
                "interval": list(wilson_interval(right, here.images)),
            }
        )
    return points


def _worse(known: Evaluation | None, found: Evaluation, epsilon: float) -> Evaluation | None:
    """Of what was found in smaller balls, that which broke more."""
    candidates = [one for one in (known, found) if one is not None and one.epsilon < epsilon]
    return min(candidates, key=lambda one: one.robust_accuracy, default=None)


def _pictures(found: Evaluation, x: Tensor, y: Tensor, data: Dataset, result: dict[str, Any]) -> AdversarialImages:
    told = ("model", "judge", "label", "suite", "seed", "clean_accuracy", "robust_accuracy", "verdict")
    return AdversarialImages(
        x_adv=found.x_adv,
        labels=y,
        indices=evenly_spaced(len(data.test), len(x)),
        attack=found.found_by,
        broken=~found.robust,
        epsilon=found.epsilon,
        data=data.name,
        clean_sha256=digest(x, y),
        about={name: result[name] for name in told},
    )
