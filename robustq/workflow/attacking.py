"""attack: how many images a model still gets right when somebody tries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustq.data import Dataset
from robustq.data.splits import evenly_spaced
from robustq.errors import UsageError
from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.evaluate import check_radius, run_suite, suite_called
from robustq.evaluation.pictures import Pictures, digest
from robustq.evaluation.result import Evaluation
from robustq.evaluation.suites import Suite
from robustq.evaluation.target import Target
from robustq.models.compiled import check_compiler
from robustq.outputs import check_new
from robustq.progress import note
from robustq.recipe import format_epsilon
from robustq.workflow.crafting import crafted_fast, tell_what_compiling_saves
from robustq.workflow.opening import Opened, open_attackable
from robustq.workflow.setting import DEFAULT_EPSILON, data_for, pick_device, tell_evaluation
from robustq.workflow.surrogates import given, of_the_paper, twins, undefended


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
    chosen = suite_called(suite)
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
        make=train_surrogates and (chosen.hunts_masking or chosen.transfers) and max([radius, *epsilons]) > 0.0,
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
    plain = replace(suite, hunts_masking=False)
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


def _pictures(found: Evaluation, x: Tensor, y: Tensor, data: Dataset, result: dict[str, Any]) -> Pictures:
    told = ("model", "judge", "label", "suite", "seed", "clean_accuracy", "robust_accuracy", "verdict")
    return Pictures(
        x_adv=found.x_adv,
        labels=y,
        places=evenly_spaced(len(data.test), len(x)),
        attack=found.found_by,
        broken=~found.robust,
        epsilon=found.epsilon,
        data=data.name,
        clean_sha256=digest(x, y),
        about={name: result[name] for name in told},
    )
