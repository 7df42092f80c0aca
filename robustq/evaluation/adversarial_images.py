"""Adversarial images as an .npz file: the proof of a robust accuracy, which anyone can replay, and a regression test.

The arrays of the file are the fields of :class:`AdversarialImages`, ``about`` as JSON text; ``indices`` is stored as
``places``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from robustq.attacks.ball import LEVEL_TOLERANCE
from robustq.data.npz import check_unpacked_size
from robustq.errors import UsageError, one_line
from robustq.files import check_seal, misfit, open_regular, parse_bounded, seal
from robustq.outputs import write_new

_TYPES = {
    "x_adv": "u1",
    "labels": "i8",
    "places": "i8",
    "attack": "U",
    "broken": "b1",
    "epsilon": "f8",
    "data": "U",
    "clean_sha256": "U",
    "about": "U",
}


@dataclass(frozen=True)
class AdversarialImages:
    """The content of the file.

    Args:
        x_adv: uint8 (N, C, H, W), the worst adversarial image of each image.
        labels: int64 (N,).
        indices: int64 (N,), of the images in the test part of the data set.
        attack: N names of the attacks that found them; ``clean``: the image is wrong without attack.
        broken: bool (N,), whether the judge was wrong on it.
        epsilon: radius in [0, 1].
        data: name of the data set.
        clean_sha256: see :func:`digest`.
        about: model, suite, seed and accuracies of the evaluation.
    """

    x_adv: Tensor
    labels: Tensor
    indices: Tensor
    attack: tuple[str, ...]
    broken: Tensor
    epsilon: float
    data: str
    clean_sha256: str
    about: dict[str, Any]

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all; returns its path (:func:`robustq.outputs.write_new`)."""

        def write(file: BinaryIO) -> None:
            np.savez_compressed(
                file,
                x_adv=self.x_adv.numpy(),
                labels=self.labels.numpy(),
                places=self.indices.numpy(),
                attack=np.array(self.attack, dtype=np.str_),
                broken=self.broken.numpy(),
                epsilon=np.float64(self.epsilon),
                data=np.str_(self.data),
                clean_sha256=np.str_(self.clean_sha256),
                about=np.str_(json.dumps(self.about)),
            )
            seal(file)

        return write_new(path, write)

    @classmethod
    def load(cls, path: Path) -> AdversarialImages:
        """Read the file; nothing in it is executed.

        Raises:
            UsageError: it is missing, damaged, or another kind of file.
        """
        advice = "give the .npz that 'robustq attack --out FILE' or --save-adversarial wrote"
        if not path.exists():
            raise UsageError(f"{path}: no such file; {advice}")
        open_regular(path, error=UsageError).close()
        check_seal(path, error=UsageError)
        try:
            check_unpacked_size(path)
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in _TYPES}
            about = parse_bounded(str(arrays["about"]), json.loads)
        except KeyError as error:
            raise UsageError(f"{path}: lacks {error.args[0].split()[0]}; {advice}") from error
        except Exception as error:  # numpy, zipfile and zlib raise many types for a broken archive
            raise UsageError(f"{path}: cannot be read ({one_line(error, longest=100)}); {advice}") from error
        for name, kind in _TYPES.items():
            if arrays[name].dtype.kind != np.dtype(kind).kind:
                raise UsageError(f"{path}: {name} is {arrays[name].dtype}; {advice}")
        count = len(arrays["x_adv"]) if arrays["x_adv"].ndim == 4 else 0
        rows = [
            len(arrays[name]) if arrays[name].ndim == 1 else -1 for name in ("labels", "places", "attack", "broken")
        ]
        epsilon = float(arrays["epsilon"]) if arrays["epsilon"].ndim == 0 else math.nan
        if count == 0 or rows != [count] * 4 or not 0.0 <= epsilon <= 1.0 or not isinstance(about, dict):
            raise UsageError(f"{path}: its arrays do not fit together; {advice}")
        wrong = misfit(about, {"label?": str, "robust_accuracy?": int | float})
        if wrong is not None:
            raise UsageError(f"{path}: {wrong} of its about is {type(about[wrong]).__name__}; {advice}")
        return cls(
            torch.from_numpy(arrays["x_adv"]),
            torch.from_numpy(arrays["labels"].astype(np.int64)),
            torch.from_numpy(arrays["places"].astype(np.int64)),
            tuple(arrays["attack"].tolist()),
            torch.from_numpy(arrays["broken"]),
            epsilon,
            str(arrays["data"]),
            str(arrays["clean_sha256"]),
            about,
        )


def digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 (hex) of clean images, uint8 (N, C, H, W), and their labels, int64 (N,), both in C order."""
    seen = hashlib.sha256(images.contiguous().cpu().numpy().tobytes())
    seen.update(labels.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return seen.hexdigest()


def check_ball(found: AdversarialImages, images: Tensor) -> None:
    """Check that every adversarial image lies in the epsilon-ball of its clean image.

    Args:
        found: as loaded.
        images: uint8 (N, C, H, W), the clean images at ``found.indices``.

    Raises:
        UsageError: one lies outside, or the shapes differ.
    """
    if images.shape != found.x_adv.shape:
        raise UsageError(
            f"the adversarial images have shape {tuple(found.x_adv.shape)} and their clean images "
            f"{tuple(images.shape)}; give the --data they were made of"
        )
    allowed = math.floor(255 * found.epsilon + LEVEL_TOLERANCE)
    levels = (found.x_adv.int() - images.cpu().int()).abs().flatten(1).amax(dim=1)
    outside = (levels > allowed).nonzero()[:, 0]
    if len(outside):
        first = int(outside[0])
        raise UsageError(
            f"{len(outside)} pictures leave the ball: that of test image {int(found.indices[first])} by "
            f"{int(levels[first])} levels, {allowed} are allowed; the file was changed or is of other data"
        )
