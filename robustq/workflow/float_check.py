"""The float network of a checkpoint as it came in: its accuracy on held-out images, before it is quantized.

A wrong normalisation, other data or another order of classes shows here, and not after hours of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.checkpoint import load_weights
from robustq.data import Dataset, to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import constant_accuracy, correct, wilson_interval
from robustq.models.fx.factory import timm_normalisation
from robustq.models.layers import IMAGENET
from robustq.models.spec import ModelSpec, build_model
from robustq.models.state_dict import with_names_of
from robustq.progress import note

IMAGES = 500
"""Held-out images that are counted."""

STATED = ("best_prec1", "best_acc1", "best_acc", "best_accuracy", "acc1", "acc", "accuracy")
"""Keys of training checkpoints with an accuracy in percent or as a fraction."""

SHORTFALL = 0.1
"""How far below the stated accuracy the counted one may surely lie."""


def stated_accuracy(content: Any, metadata: Mapping[str, str]) -> float | None:
    """The accuracy that a training checkpoint or the metadata of its file state, as a fraction; None if none does."""
    values: list[Any] = [content.get(key) for key in STATED] if isinstance(content, dict) else []
    numbers = [float(value) for value in values if isinstance(value, int | float) or getattr(value, "ndim", None) == 0]
    for text in filter(None, map(metadata.get, STATED)):
        with suppress(ValueError):
            numbers.append(float(text))
    return next((value / 100 if value > 1 else value for value in numbers if 0 < value <= 100), None)


def published_normalisation(architecture: str) -> str | None:
    """The value of --normalisation that timm gives for the published weights of ``timm:NAME``; None if unknown."""
    found = timm_normalisation(architecture)
    if found is None:
        return None
    mean, std = map(tuple, found)
    if (mean, std) == IMAGENET:
        return "imagenet"
    return "none" if (set(mean), set(std)) == ({0.0}, {1.0}) else "/".join(",".join(map(str, row)) for row in found)


def note_normalisation(architecture: str) -> None:
    """A line where no normalisation was given for weights that timm publishes with one."""
    wanted = published_normalisation(architecture)
    if wanted not in (None, "none"):
        note(f"pixels  / 255 without a normalisation; timm's weights of {architecture} expect --normalisation {wanted}")


def count_float_network(
    state: dict[str, torch.Tensor],
    spec: ModelSpec,
    data: Dataset,
    *,
    network: nn.Module | None = None,
    path: Path,
    custom_model: str | None,
    device: torch.device,
    is_foreign: bool,
    stated: float | None,
) -> float:
    """The share of up to :data:`IMAGES` held-out images that the float network of ``spec`` answers right.

    Args:
        state: its weights, under the names of the file at ``path``.
        network: with these weights; None builds it, which takes seconds for a deep graph.
        is_foreign: whether another program than robustq wrote the file, so that its normalisation may be unknown.
        stated: the accuracy that the file states, as a fraction.

    UsageError for a foreign network that is not surely better than a constant answer, or surely worse than the file
    states.
    """
    if network is None:
        network = build_model(spec, custom_model=custom_model)
        load_weights(network, with_names_of(network, state), path)
    images, labels = data.holdout.take(min(IMAGES, len(data.holdout)))
    x, y = to_float(images.to(device)), labels.to(device)
    right = int(correct(network.to(device).eval(), x, y, batch_size=100).sum())
    count, share = len(labels), right / len(labels)
    low, high = wilson_interval(right, count)
    found = f"{100 * share:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {count:,} held-out images"
    seen = ", which it may have been trained on" if is_foreign else ""
    note(f"float   as given: clean {found}{seen}")
    chance = constant_accuracy(labels)
    wrong = ""
    if low <= chance:
        wrong = "near chance"
    elif stated is not None and high < stated - SHORTFALL:
        wrong = f"where the file states {100 * stated:.1f}%"
    if is_foreign and wrong:
        wanted = published_normalisation(spec.architecture)
        option = "--normalisation" if wanted is None else f"--normalisation {wanted} for timm's own weights"
        raise UsageError(
            f"{path} as given answers {found} right, {wrong}; name the normalisation that it was trained with "
            f"({option}), or check --data and the order of the classes; --no-checks goes on all the same"
        )
    return share
