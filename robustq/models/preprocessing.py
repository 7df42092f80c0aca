"""The preprocessing that a network expects: what the program around it does to an image before."""

from __future__ import annotations

from typing import Any

from robustq.data.resize import SQUASH, shorter_side_of
from robustq.models.spec import ModelSpec

COLOURS = {1: "grey", 3: "RGB"}
"""Channels -> order of the channels."""

RANGES = {"float": "pixel / 255", "uint8": "pixels 0 to 255"}
"""Input of a file -> range of its values."""


def preprocessing_of(spec: ModelSpec, *, pixels: str = "float") -> dict[str, Any]:
    """Channel order, resizing, crop and pixel range, in plain JSON types.

    ``resize`` is ``none`` where the images of the data were used as they are, in one size. ``mean`` and ``std`` are
    those of the layer inside the network: the device must not apply them again.

    Args:
        pixels: of the deployed file: ``float`` or ``uint8``.
    """
    side = spec.image_size
    shorter = shorter_side_of(spec.resize, image_size=None)
    kind = "none" if spec.resize is None else "squash" if spec.resize == SQUASH else "short-side"
    mean, std = (None, None) if spec.normalisation is None else map(list, spec.normalisation)
    return {
        "channels": COLOURS.get(spec.channels, f"{spec.channels} channels"),
        "resize": kind,
        "shorter_side": None if kind != "short-side" else side if shorter is None else shorter,
        "interpolation": None if kind == "none" else "bilinear, antialiased",
        "crop": "centre" if kind == "short-side" else None,
        "size": [side, side],
        "range": RANGES[pixels],
        "mean": mean,
        "std": std,
        "mean_and_std_applied_by": None if mean is None else "the network",
    }
