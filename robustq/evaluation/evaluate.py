"""Counts accuracy under attack: differentiable models find the images, the judge answers for them.

The judge is the thing whose robustness is claimed (for a deployed file: onnxruntime); the source is a differentiable
model near it, often the same. Every adversarial image is rounded to a uint8 picture inside the ball before it is
counted, since a device can receive nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from robustq.attacks.ball import LEVEL_TOLERANCE, check_epsilon
from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.errors import RobustqError, UsageError
from robustq.evaluation.accuracy import answers, predict
from robustq.evaluation.diagnosis import diagnose
from robustq.evaluation.evaluator import DIAGNOSIS, AttackResult, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.result import Evaluation
from robustq.evaluation.suites import SUITES, NamedAttack, Suite
from robustq.evaluation.target import AS_TRAINED, Target, settled


def evaluate(
    judge: Model,
    source: Model,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[NamedAttack],
    epsilon: float,
    device: torch.device,
    batch_size: int = 256,
    seed: int = 0,
) -> Evaluation:
    """Attack ``source``, count on ``judge``: each attack over all images, nothing hunted for.

    Args:
        judge: float32 (B, C, H, W) on ``device`` -> logits (B, K).
        source: the same, differentiable; in eval mode.
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        attacks: which, in order.
        epsilon, device, batch_size, seed: as for :func:`run_suite`.

    Raises:
        UsageError: as for :func:`run_suite`.
    """
    suite = Suite("own", tuple(attacks), drops_broken=False, hunts_masking=False)
    target = Target(judge, {AS_TRAINED: source})
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
    """Attack a target, count on its judge, and look for gradient masking where the suite does.

    Args:
        target: judge, sources, and what else attacks may use; all models in eval mode, on ``device``.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), 0 .. K-1.
        suite: a suite or its name.
        epsilon: radius in [0, 1].
        device: where the sources live.
        batch_size: images an attack works on at once.
        seed: of all random numbers. Each image has its own stream, from the seed, its place and the attack's name, so
            that results are the same at equal batch size and device; at another batch size kernels round otherwise.
        known: what was found on the same judge and images in a smaller ball, whose pictures lie in this one too: what
            broke there is broken here.

    Raises:
        UsageError: no images, another number of labels, labels that are no classes of the judge, a radius above 0 and
            below one grey level, or a judge that cannot take the images.
    """
    if isinstance(suite, str):
        suite = suite_called(suite)
    _check(images, labels, epsilon=epsilon)
    start = time.perf_counter()
    # A network that draws random numbers of its own would make two evaluations differ, and move the caller's stream.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, y = to_float(images.to(device)), labels.to(device)
        _probe(target.judge, x)
        target, random = settled(target, x, batch_size=batch_size)
        campaign = Evaluator(target.judge, x, y, epsilon=epsilon, batch_size=batch_size, seed=seed)
        if not 0 <= int(labels.min()) <= int(labels.max()) < campaign.classes:
            raise UsageError(
                f"labels go from {int(labels.min())} to {int(labels.max())}, the model answers with "
                f"{campaign.classes} classes; give the data it was trained on"
            )
        if known is not None:
            campaign.start_from(known.x_adv, known.found_by, broken=known.clean & ~known.robust)
        source_classes = predict(target.source, x, batch_size=batch_size)
        different = int((source_classes != campaign.predicted).sum())
        left_out, notes = _shortcomings(target, suite, campaign, epsilon=epsilon, random=random)
        checks: list[Check] = []
        if epsilon > 0.0 and campaign.classes > 1:
            _attack(campaign, target, suite)
            if suite.hunts_masking:
                checks = diagnose(target, campaign, suite=suite, different=different, random=random)
    attacked = {trial.name: trial.kept for trial in campaign.trials if trial.stage != DIAGNOSIS}
    return Evaluation(
        images=len(x),
        epsilon=epsilon,
        clean=campaign.clean,
        robust=campaign.standing,
        attacked=attacked,
        twin_agreement=1.0 - different / len(x),
        seconds=time.perf_counter() - start,
        trials=campaign.trials,
        checks=checks,
        left_out=left_out,
        notes=notes,
        x_adv=(campaign.x_adv * 255.0).round().to("cpu", torch.uint8),
        found_by=tuple(campaign.found_by),
    )


def suite_called(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in SUITES:
        raise UsageError(f"unknown suite '{name}'; known: {', '.join(SUITES)}")
    return SUITES[name]


def _attack(campaign: Evaluator, target: Target, suite: Suite) -> None:
    everything = torch.arange(len(campaign.x))
    reference: AttackResult | None = None
    for attack in suite.attacks:
        if attack.asks == "surrogates":
            for name, surrogate in target.surrogates.items():
                places = campaign.remaining_indices
                campaign.run(attack, target.asked, places, label=f"{attack.name}: {name}", surrogate=surrogate)
        elif attack.asks == "features":
            if target.features is not None:
                campaign.run(attack, target.source, campaign.remaining_indices, features=target.features)
        elif attack.asks == "judge":
            campaign.run(attack, target.asked, campaign.remaining_indices)
        else:
            # A column of a table has one gradient, the one that training used.
            rules = list(target.sources.items())[: None if suite.drops_broken else 1]
            for number, (rule, model) in enumerate(rules):
                places = campaign.remaining_indices if suite.drops_broken else everything
                if number == 0 and attack.after is not None and reference is not None:
                    places = reference.kept_indices
                label = attack.name if number == 0 else f"{attack.name} ({rule})"
                trial = campaign.run(attack, model, places, label=label)
                reference = trial if reference is None else reference
    if suite.transfers:
        for name, surrogate in target.surrogates.items():
            for attack in suite.attacks:
                campaign.run(attack, surrogate, everything, label=f"{attack.name} (B: {name})", stage="transfer")


def _shortcomings(
    target: Target, suite: Suite, campaign: Evaluator, *, epsilon: float, random: float
) -> tuple[list[str], list[str]]:
    """Why no verdict can be given, and what else is worth knowing."""
    left_out, notes = [], []
    if not suite.hunts_masking:
        left_out.append("this suite does not hunt for gradient masking")
    elif epsilon == 0.0:
        left_out.append("there is nothing to attack at epsilon 0")
    elif campaign.classes < 2:
        left_out.append("there is nothing to attack in a model with one class")
    elif target.control is None:
        left_out.append("without a naturally trained control nobody knows what the attacks are worth")
    if target.image_by_image:
        notes.append("answers depend on the batch (dynamic quantization): judged image by image")
    if random > 0.0:
        notes.append("answers are random: judged in the mean of several")
    if campaign.predicted.eq(-1).any():
        notes.append(f"{int(campaign.predicted.eq(-1).sum())} clean images get NaN logits, which count as wrong")
    if suite.hunts_masking and target.features is None:
        notes.append("no feature layer is known: the feature-space stage was left out")
    if suite.hunts_masking and not target.surrogates:
        notes.append("no surrogates: the transfer stage was left out")
    return left_out, notes


def _probe(judge: Model, x: Tensor) -> None:
    """Ask about one image, so that images of another shape than the model takes end in one line.

    Raises:
        UsageError: it cannot be asked.
    """
    try:
        answers(judge, x[:1], batch_size=1)
    except RobustqError:
        raise
    except Exception as error:  # torch, onnxruntime and a user's own code share no base below Exception
        first = " ".join(str(error).split())[:160]
        raise UsageError(
            f"the model cannot take images of shape {tuple(x.shape[1:])} ({first}); give the data it was trained on"
        ) from error


def _check(images: Tensor, labels: Tensor, *, epsilon: float) -> None:
    if len(images) == 0:
        raise UsageError("no images to evaluate on; give --images of at least 1")
    if len(images) != len(labels):
        raise UsageError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    check_radius(epsilon)


def check_radius(epsilon: float) -> None:
    """Raise UsageError unless epsilon is 0, or a number up to 1 that lets a pixel change by a grey level."""
    check_epsilon(epsilon)
    if epsilon > 0.0 and math.floor(255 * epsilon + LEVEL_TOLERANCE) < 1:
        raise UsageError(
            f"epsilon {epsilon:g} is below one grey level, so that no uint8 picture differs; give 0, or 1/255 and up"
        )
