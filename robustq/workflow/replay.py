"""attack --replay: judge saved adversarial images on this model or another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustq.data import to_float
from robustq.errors import DataError, UsageError
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.evaluation.adversarial_images import AdversarialImages, check_ball, digest
from robustq.evaluation.evaluator import CLEAN
from robustq.evaluation.flags import NOT_JUDGED, Check
from robustq.evaluation.target import one_by_one
from robustq.progress import note
from robustq.workflow import Result
from robustq.workflow.open_model import OpenedModel, open_attackable
from robustq.workflow.setup import data_for, pick_device
from robustq.zoo import images_path

BATCH = 256
REPLAY = "replay"  # in the place of a suite


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplayResult(Result):
    """Result of a replay, with the keys of :class:`robustq.workflow.attack.RobustnessResult` that apply."""

    model: Path
    judge: str
    label: str
    data: str
    suite: str = REPLAY
    file_failures: tuple[str, ...]
    replayed: Path  # the .npz
    found_on: dict[str, Any]  # model, suite, seed and accuracies of the attack that found the images
    images: int
    wrong_before: int  # images that were wrong before that attack, which left them clean
    epsilon: float
    ball_checked: bool  # whether the clean images were available; else the clean accuracy is None
    clean_accuracy: float | None
    clean_interval: tuple[float, float] | None
    robust_accuracy: float
    interval: tuple[float, float]
    attacks: dict[str, float]  # ``replay``: share of right answers to the adversarial images
    same_as_recorded: float  # share of images that are robust here and there, or broken here and there
    twin_agreement: float | None = 1.0
    flags: tuple[Check, ...] = ()
    verdict: str = NOT_JUDGED
    not_judged_for: tuple[str, ...] = ("these images were found before, and nothing was attacked",)
    seconds: float


def replay_images(
    model: Path | str,
    file: Path | str,
    *,
    data: str | None = None,
    custom_model: str | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
    pixels: str | None = None,
    layout: str | None = None,
    runtime: str | None = None,
    device: str | None = None,
) -> ReplayResult:
    """Count a model's answers to saved adversarial images: to verify a number, or as a regression test.

    If the model's data (or ``data``) are available, the images are checked to lie in the ball of their clean images,
    and an image counts as robust only when its clean image is right too.

    Args:
        model: path of a model file of robustq, an export folder or a lone .onnx, or ``zoo:NAME``; the attacked model,
            or another.
        file: path of an .npz of ``robustq attack`` (or ``save_adversarial``).
        data: data set whose test images were attacked: a known name, a folder of images or an .npz file; None: as the
            model or ``file`` says.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.
        resize: how images of a folder become square: ``"short-side"``, ``"short-side:PIXELS"`` or ``"squash"``; None:
            as for the model, else ``"short-side"``.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        pixels: range in which a lone .onnx takes pixels: ``"unit"`` ([0, 1]), ``"uint8"`` (0 to 255), ``"imagenet"`` or
            ``"MEAN/STD"``; None: as the file says.
        layout: of a lone .onnx: ``"nchw"`` or ``"nhwc"``; None: as its shape says.
        runtime: that judges an export folder or an .onnx; None: onnxruntime.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``; None: a GPU if there is one.

    Returns:
        clean and robust accuracy as fractions with 95% intervals; ``wrong_before`` counts the images that were wrong
        before they were attacked.

    Raises:
        UsageError: ``file`` cannot be read, is of other data, or has an image outside the ball.
        ModelFileError: the model cannot be read.
        DataError: ``data`` was given and is missing, broken or unfit.
    """
    file = images_path(file)
    images = AdversarialImages.load(file)
    place = pick_device(device)
    opened = open_attackable(
        model,
        custom_model=custom_model,
        device=place,
        data=data or images.data,
        pixels=pixels,
        layout=layout,
        resize=resize,
        skip_bad_images=skip_bad_images,
        runtime=runtime,
    )
    spec = opened.spec
    wanted, got = (spec.channels, spec.image_size, spec.image_size), tuple(images.x_adv.shape[1:])
    if got != wanted:
        raise UsageError(f"{file}: holds images of shape {got}, the model takes {wanted}; replay it on another model")
    if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < spec.classes:
        raise UsageError(f"{file}: has labels that the model does not have; it has {spec.classes} classes")
    clean = _clean_images(images, file, opened, data, resize=resize, skip_bad_images=skip_bad_images)
    start = time.perf_counter()
    judge = one_by_one(opened.judge) if opened.target().image_by_image else opened.judge

    def right(x: Tensor) -> Tensor:
        return correct(judge, to_float(x.to(place)), images.labels, batch_size=BATCH)

    kept = right(images.x_adv)
    unattacked = None if clean is None else right(clean)
    robust = kept if unattacked is None else kept & unattacked
    count = len(kept)
    return ReplayResult(
        model=opened.path.absolute(),
        judge=opened.judge_name,
        label=opened.label,
        data=images.data,
        file_failures=tuple(opened.failures),
        replayed=file.absolute(),
        found_on=images.about,
        images=count,
        wrong_before=images.attack.count(CLEAN),
        epsilon=images.epsilon,
        ball_checked=clean is not None,
        clean_accuracy=None if unattacked is None else int(unattacked.sum()) / count,
        clean_interval=None if unattacked is None else wilson_interval(int(unattacked.sum()), count),
        robust_accuracy=int(robust.sum()) / count,
        interval=wilson_interval(int(robust.sum()), count),
        attacks={REPLAY: int(kept.sum()) / count},
        same_as_recorded=int((~robust == images.broken).sum()) / count,
        seconds=time.perf_counter() - start,
    )


def _clean_images(
    found: AdversarialImages,
    file: Path,
    opened: OpenedModel,
    data: str | None,
    *,
    resize: str | None,
    skip_bad_images: bool,
) -> Tensor | None:
    """The clean images of ``found``, with the ball checked; None if their data are not available.

    Raises:
        DataError: ``data`` was given and cannot be read.
        UsageError: the test part holds other images, or an adversarial image lies outside the ball.
    """
    try:
        loaded = data_for(opened.spec, data, opened.checkpoint, resize=resize, skip_bad_images=skip_bad_images)
    except DataError as error:
        if data is not None:
            raise
        note(f"ball    not checked: {error}")
        return None
    images, labels = loaded.test.take(0)
    advice = f"give the --data they were made of ({found.data})"
    last = int(found.indices.max())
    if int(found.indices.min()) < 0 or last >= len(labels):
        raise UsageError(f"{file}: has test image {last}, {loaded.name} has {len(labels)}; {advice}")
    images, labels = images[found.indices], labels[found.indices]
    if digest(images, labels) != found.clean_sha256 or not torch.equal(labels, found.labels):
        raise UsageError(
            f"{file}: was made of other images than the test part of {loaded.name} (sha256 differs); {advice}"
        )
    check_ball(found, images)
    return images
