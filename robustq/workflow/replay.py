"""attack --replay: adversarial images that were found before, on this model or another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustq.data import to_float
from robustq.errors import DataError, UsageError
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.evaluation.adversarial_images import AdversarialImages, check_ball, digest
from robustq.evaluation.flags import NOT_JUDGED
from robustq.evaluation.target import one_by_one
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.workflow.open_model import Opened, open_attackable
from robustq.workflow.setup import data_for, pick_device

BATCH = 256


def replay_pictures(
    model: Path | str,
    file: Path | str,
    *,
    data: str | None = None,
    own_model: str | None = None,
    skip_bad_images: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Count a model's answers to the adversarial images of a file: proof of a number, or a regression test.

    Where the model's data (or ``data``) can be had, the images are checked to lie in the ball of their clean images,
    and an image counts as robust only when it is right without attack too.

    Args:
        model: a .pt that robustq wrote, or an export folder; the one that they were found on, or another.
        file: an .npz that ``robustq attack`` wrote.
        data, own_model, skip_bad_images, device: as for :func:`robustq.workflow.attack.attack_model`.

    Returns:
        The keys of ``robustq attack --json``; ``attacks`` holds ``replay``, the share of the pictures that are right.

    Raises:
        RobustqError: bad input, other data than the file was made of, or a picture outside the ball.
    """
    pictures = AdversarialImages.load(Path(file))
    place = pick_device(device)
    opened = open_attackable(model, own_model=own_model, device=place)
    _check_size(pictures, opened.spec, Path(file))
    clean = _clean_images(pictures, Path(file), opened, data, skip_bad_images=skip_bad_images)
    start = time.perf_counter()
    judge = one_by_one(opened.judge) if opened.target().image_by_image else opened.judge

    def right(images: Tensor) -> Tensor:
        return correct(judge, to_float(images.to(place)), pictures.labels, batch_size=BATCH)

    kept = right(pictures.x_adv)
    unattacked = None if clean is None else right(clean)
    robust = kept if unattacked is None else kept & unattacked
    count = len(kept)
    return {
        "model": str(opened.path.absolute()),
        "judge": "onnxruntime" if opened.deployed is not None else "pytorch",
        "label": opened.spec.label,
        "data": pictures.data,
        "suite": "replay",
        "file_failures": opened.failures,
        "replayed": str(Path(file).absolute()),
        "found_on": pictures.about,
        "images": count,
        "epsilon": pictures.epsilon,
        "ball_checked": clean is not None,
        "clean_accuracy": None if unattacked is None else int(unattacked.sum()) / count,
        "clean_interval": None if unattacked is None else list(wilson_interval(int(unattacked.sum()), count)),
        "robust_accuracy": int(robust.sum()) / count,
        "interval": list(wilson_interval(int(robust.sum()), count)),
        "attacks": {"replay": int(kept.sum()) / count},
        "same_as_recorded": int((~robust == pictures.broken).sum()) / count,
        "twin_agreement": 1.0,
        "flags": [],
        "verdict": NOT_JUDGED,
        "not_judged_for": ["these images were found before, and nothing was attacked"],
        "seconds": time.perf_counter() - start,
    }


def _check_size(pictures: AdversarialImages, spec: ModelSpec, file: Path) -> None:
    wanted, got = (spec.channels, spec.image_size, spec.image_size), tuple(pictures.x_adv.shape[1:])
    if got != wanted:
        raise UsageError(f"{file}: holds images of shape {got}, the model takes {wanted}; replay it on another model")
    if not 0 <= int(pictures.labels.min()) <= int(pictures.labels.max()) < spec.classes:
        raise UsageError(f"{file}: has labels the model does not know, it has {spec.classes} classes")


def _clean_images(
    pictures: AdversarialImages, file: Path, opened: Opened, data: str | None, *, skip_bad_images: bool
) -> Tensor | None:
    """The clean images behind the pictures, with the ball checked; None where their data cannot be had.

    Raises:
        DataError: ``data`` was named and cannot be read.
        UsageError: the test part holds other images at their places, or a picture lies outside the ball.
    """
    try:
        loaded = data_for(opened.spec, data, opened.checkpoint, skip_bad_images=skip_bad_images)
    except DataError as error:
        if data is not None:
            raise
        note(f"ball    not checked: {error}")
        return None
    images, labels = loaded.test.take(0)
    advice = f"give the --data they were made of ({pictures.data})"
    last = int(pictures.indices.max())
    if int(pictures.indices.min()) < 0 or last >= len(labels):
        raise UsageError(f"{file}: has test image {last}, {loaded.name} has {len(labels)}; {advice}")
    images, labels = images[pictures.indices], labels[pictures.indices]
    if digest(images, labels) != pictures.clean_sha256 or not torch.equal(labels, pictures.labels):
        raise UsageError(
            f"{file}: was made of other images than the test part of {loaded.name} (sha256 differs); {advice}"
        )
    check_ball(pictures, images)
    return images
