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
from robustq.evaluation.flags import NOT_JUDGED
from robustq.evaluation.target import one_by_one
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.workflow import Result
from robustq.workflow.open_model import Opened, open_attackable
from robustq.workflow.setup import data_for, pick_device

BATCH = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplayResult(Result):
    """Result of a replay.

    Args:
        model, deployed, label, file_failures: as :class:`robustq.workflow.attack.RobustnessResult`.
        file: the replayed .npz.
        images: its content.
        correct: (N,) bool, right answers to the adversarial images.
        clean: (N,) bool, right answers to the clean images; None: not available, so that the ball is not checked.
        seconds: wall time.
    """

    model: Path
    deployed: bool
    label: str
    file_failures: tuple[str, ...]
    file: Path
    images: AdversarialImages
    correct: Tensor
    clean: Tensor | None
    seconds: float

    @property
    def robust(self) -> Tensor:
        """(N,) bool, right on both images."""
        return self.correct if self.clean is None else self.correct & self.clean

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``robustq attack --json``; ``attacks`` holds ``replay``, the share of ``correct``."""
        count, robust = len(self.correct), int(self.robust.sum())
        clean = None if self.clean is None else int(self.clean.sum())
        return {
            "model": str(self.model),
            "judge": "onnxruntime" if self.deployed else "pytorch",
            "label": self.label,
            "data": self.images.data,
            "suite": "replay",
            "file_failures": list(self.file_failures),
            "replayed": str(self.file),
            "found_on": self.images.about,
            "images": count,
            "epsilon": self.images.epsilon,
            "ball_checked": self.clean is not None,
            "clean_accuracy": None if clean is None else clean / count,
            "clean_interval": None if clean is None else list(wilson_interval(clean, count)),
            "robust_accuracy": robust / count,
            "interval": list(wilson_interval(robust, count)),
            "attacks": {"replay": int(self.correct.sum()) / count},
            "same_as_recorded": int((~self.robust == self.images.broken).sum()) / count,
            "twin_agreement": 1.0,
            "flags": [],
            "verdict": NOT_JUDGED,
            "not_judged_for": ["these images were found before, and nothing was attacked"],
            "seconds": self.seconds,
        }


def replay_pictures(
    model: Path | str,
    file: Path | str,
    *,
    data: str | None = None,
    own_model: str | None = None,
    skip_bad_images: bool = False,
    device: str | None = None,
) -> ReplayResult:
    """Count a model's answers to saved adversarial images: to verify a number, or as a regression test.

    If the model's data (or ``data``) are available, the images are checked to lie in the ball of their clean images,
    and an image counts as robust only when its clean image is right too.

    Args:
        model: a .pt of robustq, or an export folder; the attacked model, or another.
        file: an .npz of ``robustq attack``.
        data, own_model, skip_bad_images, device: as for :func:`robustq.workflow.attack.attack_model`.

    Raises:
        RobustqError: bad input, other data than those of the file, or an image outside the ball.
    """
    file = Path(file)
    images = AdversarialImages.load(file)
    place = pick_device(device)
    opened = open_attackable(model, own_model=own_model, device=place)
    _check_size(images, opened.spec, file)
    clean = _clean_images(images, file, opened, data, skip_bad_images=skip_bad_images)
    start = time.perf_counter()
    judge = one_by_one(opened.judge) if opened.target().image_by_image else opened.judge

    def right(x: Tensor) -> Tensor:
        return correct(judge, to_float(x.to(place)), images.labels, batch_size=BATCH)

    return ReplayResult(
        model=opened.path.absolute(),
        deployed=opened.deployed is not None,
        label=opened.spec.label,
        file_failures=tuple(opened.failures),
        file=file.absolute(),
        images=images,
        correct=right(images.x_adv),
        clean=None if clean is None else right(clean),
        seconds=time.perf_counter() - start,
    )


def _check_size(found: AdversarialImages, spec: ModelSpec, file: Path) -> None:
    wanted, got = (spec.channels, spec.image_size, spec.image_size), tuple(found.x_adv.shape[1:])
    if got != wanted:
        raise UsageError(f"{file}: holds images of shape {got}, the model takes {wanted}; replay it on another model")
    if not 0 <= int(found.labels.min()) <= int(found.labels.max()) < spec.classes:
        raise UsageError(f"{file}: has labels that the model does not have; it has {spec.classes} classes")


def _clean_images(
    found: AdversarialImages, file: Path, opened: Opened, data: str | None, *, skip_bad_images: bool
) -> Tensor | None:
    """The clean images of ``found``, with the ball checked; None if their data are not available.

    Raises:
        DataError: ``data`` was given and cannot be read.
        UsageError: the test part holds other images, or an adversarial image lies outside the ball.
    """
    try:
        loaded = data_for(opened.spec, data, opened.checkpoint, skip_bad_images=skip_bad_images)
    except DataError as error:
        if data is not None:
            raise
        note(f"ball    not checked: {error}")
        return None
    images, labels = loaded.test.take(0)
    advice = f"give the --data they were made of ({found.data})"
    last = int(found.places.max())
    if int(found.places.min()) < 0 or last >= len(labels):
        raise UsageError(f"{file}: has test image {last}, {loaded.name} has {len(labels)}; {advice}")
    images, labels = images[found.places], labels[found.places]
    if digest(images, labels) != found.clean_sha256 or not torch.equal(labels, found.labels):
        raise UsageError(
            f"{file}: was made of other images than the test part of {loaded.name} (sha256 differs); {advice}"
        )
    check_ball(found, images)
    return images
