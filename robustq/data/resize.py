"""How image files of any size become square: the whole image squashed, or the shorter side scaled and the centre kept.

As text, in options and specs: ``squash``, ``short-side`` (to the image size, or 8/7 of it in streamed sets) or
``short-side:256`` (to 256 pixels).
"""

from __future__ import annotations

import re
from typing import Any

from robustq.errors import UsageError

SQUASH = "squash"
SHORT_SIDE = "short-side"

_FORM = re.compile(rf"{SQUASH}|{SHORT_SIDE}(?::([1-9][0-9]{{0,4}}))?")


def is_resize(value: Any) -> bool:
    """Whether ``value`` is a text of one of the three forms."""
    return isinstance(value, str) and _FORM.fullmatch(value) is not None


def shorter_side_of(resize: str | None, *, image_size: int | None) -> int | None:
    """Pixels to which the shorter side is scaled; None: not stated, or the image is squashed.

    Raises:
        UsageError: another form, or fewer pixels than ``image_size``, to which the centre is cropped.
    """
    match = None if resize is None else _FORM.fullmatch(resize)
    if match is None:
        if resize is None:
            return None
        raise UsageError(
            f"resize is '{resize}'; give {SQUASH} (the whole image), {SHORT_SIDE} (its centre) or {SHORT_SIDE}:PIXELS, "
            f"such as {SHORT_SIDE}:256"
        )
    side = None if match[1] is None else int(match[1])
    if side is not None and image_size is not None and side < image_size:
        raise UsageError(f"resize is '{resize}', less than the image size of {image_size}; give {image_size} or more")
    return side
