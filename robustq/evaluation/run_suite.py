"""Accuracy under attack: gradient models find adversarial images, the judge counts them.

Every adversarial image is rounded to uint8 inside the ball before it counts (:mod:`robustq.evaluation.evaluator`),
since a device receives uint8.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robustq.attacks.ball import LEVEL_TOLERANCE, check_epsilon, round_to_uint8
from robustq.attacks.base import Model, lack_of_gradient
from robustq.data import to_float
from robustq.errors import RobustqError, UsageError
from robustq.evaluation import flags
from robustq.evaluation.accuracy import all_logits, predict
from robustq.evaluation.diagnosis import diagnose
from robustq.evaluation.evaluator import DIAGNOSIS, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.result import Evaluation, SingleAnswers
from robustq.evaluation.stages import run_stages, through_file_alone
from robustq.evaluation.suites import SUITES, NamedAttack, Suite, without_gradients
from robustq.evaluation.target import AS_TRAINED, DRAWS, Target, adapt_target, share_right


def evaluate(
    judge: Model,
    gradient_model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[NamedAttack],
    epsilon: float,
    device: torch.device,
    batch_size: int = 256,
    seed: int = 0,
    file_alone: Model | None = None,
) -> Evaluation:
    """:func:`run_suite` of attacks that each run on all images, with one gradient model and no checks for masking."""
    suite = Suite("own", tuple(attacks), drops_broken=False, checks_masking=False)
    target = Target(judge, {AS_TRAINED: gradient_model}, file_alone=file_alone)
    return run_suite(
        target, images, labels, suite=suite, epsilon=epsilon, device=device, batch_size=batch_size, seed=seed
    )


def run_suite(
    target: Target,
    images: Tensor,
    labels: Tensor,
    *,
    suite: Suite | str = "standard",
    epsilon: float,
    device: torch.device,
    batch_size: int = 256,
    seed: int = 0,
    known: Evaluation | None = None,
) -> Evaluation:
    """Attack a target, count on its judge, and check for gradient masking if the suite does.

    Args:
        target: judge, gradient models, and other inputs of attacks; all models in eval mode, on ``device``.
        images, labels: uint8 (N, C, H, W), and int64 (N,), 0 .. K-1.
        suite: a suite or its name.
        epsilon, batch_size: radius in [0, 1], and images per call of an attack.
        device: of the gradient models.
        seed: of all random numbers; at another batch size or device kernels round differently.
        known: an evaluation of the same judge and images in a smaller ball: images that broke there are broken here.

    Without gradient models, or where they give no gradient, the attacks without gradients run
    (:func:`robustq.evaluation.suites.without_gradients`). UsageError for no images, another number of labels, labels
    outside the classes of the judge, a radius above 0 and below one grey level, a judge that cannot take the images, or
    a suite of gradient attacks alone without gradients.
    """
    if isinstance(suite, str):
        suite = find_suite(suite)
    if len(images) == 0:
        raise UsageError("no images to evaluate on; give --images of at least 1")
    if len(images) != len(labels):
        raise UsageError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    check_radius(epsilon)
    start = time.perf_counter()
    # A network that draws random numbers must not move the caller's generator, nor differ between two evaluations.
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        x, y = to_float(images.to(device)), labels.to(device)
        _check_image_shape(target.judge, x)
        lacks = {name: lack_of_gradient(model, x[:2]) for name, model in target.gradient_models.items()}
        lack = next((reason for reason in lacks.values() if reason is not None), None)
        searches_only = lack is not None or not target.gradient_models
        asked_for_flags = suite.checks_masking
        if searches_only:
            suite = without_gradients(suite, reason=lack or "no model gives them")
            target = replace(target, gradient_models={}, features=None)
        target, random = adapt_target(target, x, batch_size=batch_size)
        evaluator = Evaluator(target.judge, x, y, epsilon=epsilon, batch_size=batch_size, seed=seed)
        if not 0 <= int(labels.min()) <= int(labels.max()) < evaluator.classes:
            raise UsageError(
                f"labels go from {int(labels.min())} to {int(labels.max())}, the model answers with "
                f"{evaluator.classes} classes; give the data it was trained on"
            )
        if known is not None:
            evaluator.start_from(known.x_adv, known.found_by, broken=known.clean & ~known.robust)
        different = 0
        if target.gradient_models:
            different = int((predict(target.gradient_model, x, batch_size=batch_size) != evaluator.predicted).sum())
        checks: list[Check] = []
        if epsilon > 0.0 and evaluator.classes > 1:
            run_stages(evaluator, target, suite)
            if suite.checks_masking:
                checks = diagnose(target, evaluator, suite=suite, different=different, random=random)
            elif searches_only and asked_for_flags:
                checks = [flags.randomness(share=random, draws=DRAWS)]
            elif target.file_alone is not None and not suite.drops_broken:
                checks = [through_file_alone(evaluator, target.file_alone, suite)]
        single = None
        if target.one_answer is not None:
            x_adv = round_to_uint8(evaluator.x_adv, x, epsilon=epsilon)
            clean, attacked = (share_right(target.one_answer, one, y, batch_size=batch_size) for one in (x, x_adv))
            single = SingleAnswers(clean, torch.minimum(clean, attacked), DRAWS)
    return Evaluation(
        images=len(x),
        epsilon=epsilon,
        clean=evaluator.clean,
        robust=evaluator.robust,
        attacked={result.name: result.kept for result in evaluator.results if result.stage != DIAGNOSIS},
        twin_agreement=1.0 - different / len(x) if target.gradient_models else None,
        seconds=time.perf_counter() - start,
        x_adv=(evaluator.x_adv * 255.0).round().to("cpu", torch.uint8),
        found_by=tuple(evaluator.found_by),
        results=evaluator.results,
        checks=checks,
        not_checked=_not_checked(target, suite, evaluator),
        notes=[
            *([] if lack is None else [f"no gradients, and no attack with them: {lack}"]),
            *_notes(target, suite, evaluator, single=single),
        ],
        single=single,
    )


def find_suite(name: str) -> Suite:
    """The suite of that name; UsageError if there is none."""
    if name not in SUITES:
        raise UsageError(f"unknown suite '{name}'; known: {', '.join(SUITES)}")
    return SUITES[name]


def _not_checked(target: Target, suite: Suite, evaluator: Evaluator) -> list[str]:
    """The first reason why no verdict can be given, if there is one."""
    reasons = {
        "no gradient was used; an attack with gradients may find less": not target.gradient_models,
        "this suite does not check for gradient masking": not suite.checks_masking,
        "there is nothing to attack at epsilon 0": evaluator.epsilon == 0.0,
        "there is nothing to attack in a model with one class": evaluator.classes < 2,
        "there is no naturally trained control to show that the attacks work": target.control is None,
    }
    return [reason for reason, holds in reasons.items() if holds][:1]


def _notes(target: Target, suite: Suite, evaluator: Evaluator, *, single: SingleAnswers | None) -> list[str]:
    nan = int(evaluator.predicted.eq(-1).sum())
    notes = {
        "answers depend on the batch (dynamic quantization): judged image by image": target.image_by_image,
        f"{nan} clean images get NaN logits, which count as wrong": nan > 0,
    }
    if single is not None:
        mean = tuple(int(right.sum()) / len(evaluator.x) for right in (evaluator.clean, evaluator.robust))
        notes[
            f"answers are random: clean {single.clean_accuracy:.1%}, robust {single.robust_accuracy:.1%} in a single "
            f"answer; {mean[0]:.1%} and {mean[1]:.1%} in the mean of {single.draws}; the lower counts"
        ] = True
    if suite.checks_masking:
        notes["no feature layer is known: the feature-space stage was left out"] = target.features is None
        notes["no surrogates: the transfer stage was left out"] = not target.surrogates
    return [note for note, holds in notes.items() if holds]


def _check_image_shape(judge: Model, x: Tensor) -> None:
    """Query the judge with one image; UsageError if it cannot take the shape."""
    try:
        all_logits(judge, x[:1], batch_size=1)
    except RobustqError:
        raise
    except Exception as error:  # torch, onnxruntime and a user's own code share no base below Exception
        first = " ".join(str(error).split())[:160]
        raise UsageError(
            f"the model cannot take images of shape {tuple(x.shape[1:])} ({first}); give the data it was trained on"
        ) from error


def check_radius(epsilon: float) -> None:
    """Raise UsageError unless epsilon is 0, or a number up to 1 that lets a pixel change by a grey level."""
    check_epsilon(epsilon)
    if epsilon > 0.0 and math.floor(255 * epsilon + LEVEL_TOLERANCE) < 1:
        raise UsageError(
            f"epsilon {epsilon:g} is below one grey level, so that no uint8 image differs; give 0, or 1/255 and up"
        )
