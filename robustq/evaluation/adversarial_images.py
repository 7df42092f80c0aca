"""Adversarial images as an .npz file: the proof of a robust accuracy, which anyone can replay, and a regression test.

Its arrays are the fields of :class:`AdversarialImages`, ``about`` as JSON text; ``indices`` is stored as ``places``.
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
from robustq.files import open_regular
from robustq.outputs import write_new
from robustq.seals import check_seal, seal
from robustq.tables import misfit, parse_bounded

_KINDS = {"x_adv": "u", "labels": "i", "places": "i", "attack": "U", "broken": "b", "epsilon": "f"}
_KINDS |= dict.fromkeys(("data", "clean_sha256", "about"), "U")
"""Array -> kind of its dtype."""


@dataclass(frozen=True)
class AdversarialImages:
    """The content of the file.

    Args:
        x_adv: uint8 (N, C, H, W), the worst adversarial image of each image.
        labels, indices: int64 (N,); the indices are those of the images in the test part of the data set.
        attack: N names of the attacks that found them; ``clean``: the image is wrong without attack.
        broken: bool (N,), whether the judge was wrong on it.
        epsilon, data, clean_sha256: radius in [0, 1], name of the data set, and :func:`digest` of its images.
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
        """Read the file; nothing in it is executed. UsageError if it is missing, damaged, or another kind of file."""
        advice = "give the .npz that 'robustq attack --out FILE' or --save-adversarial wrote"
        if not path.exists():
            raise UsageError(f"{path}: no such file; {advice}")
        open_regular(path, error=UsageError).close()
        check_seal(path, error=UsageError)
        try:
            check_unpacked_size(path)
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in _KINDS}
            about = parse_bounded(str(arrays["about"]), json.loads)
        except KeyError as error:
            raise UsageError(f"{path}: lacks {error.args[0].split()[0]}; {advice}") from error
        except Exception as error:  # numpy, zipfile and zlib raise many types for a broken archive
            raise UsageError(f"{path}: cannot be read ({one_line(error, longest=100)}); {advice}") from error
        for name, kind in _KINDS.items():
            if arrays[name].dtype.kind != kind:
                raise UsageError(f"{path}: {name} is {arrays[name].dtype}; {advice}")
        x_adv, labels, indices, attack, broken, epsilon, data, clean_sha256, _ = arrays.values()
        count = len(x_adv) if x_adv.ndim == 4 else 0
        one_per_image = all(array.shape == (count,) for array in (labels, indices, attack, broken))
        is_radius = epsilon.ndim == 0 and 0.0 <= epsilon <= 1.0
        if count == 0 or not one_per_image or not is_radius or not isinstance(about, dict):
            raise UsageError(f"{path}: its arrays do not fit together; {advice}")
        wrong = misfit(about, {"label?": str, "robust_accuracy?": int | float})
        if wrong is not None:
            raise UsageError(f"{path}: {wrong} of its about is {type(about[wrong]).__name__}; {advice}")
        return cls(
            x_adv=torch.from_numpy(x_adv),
            labels=torch.from_numpy(labels.astype(np.int64)),
            indices=torch.from_numpy(indices.astype(np.int64)),
            attack=tuple(attack.tolist()),
            broken=torch.from_numpy(broken),
            epsilon=float(epsilon),
            data=str(data),
            clean_sha256=str(clean_sha256),
            about=about,
        )


def digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 (hex) of clean images, uint8 (N, C, H, W), and their labels, int64 (N,), both in C order."""
    seen = hashlib.sha256(images.contiguous().cpu().numpy().tobytes())
    seen.update(labels.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return seen.hexdigest()


def check_ball(found: AdversarialImages, images: Tensor) -> None:
    """Raise UsageError unless every adversarial image lies in the epsilon-ball of its clean image.

    ``images`` are the clean images at ``found.indices``, uint8 (N, C, H, W).
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
            f"{len(outside)} images leave the ball: that of test image {int(found.indices[first])} by "
            f"{int(levels[first])} levels, {allowed} are allowed; the file was changed or is of other data"
        )
