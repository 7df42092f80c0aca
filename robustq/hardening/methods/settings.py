"""Fields of training methods' settings, which declare their ranges and choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial
from typing import Any

from robustq.errors import UsageError
from robustq.recipe import parse_epsilon
from robustq.recipe.schema import MethodSettings as MethodSettings
from robustq.recipe.schema import number_errors, shown, unknown_value

BATCH_NORM_MODES = ("eval", "train", "separate")
"""``eval``: the running statistics, unchanged; ``train``: the batch's statistics, which update the running ones;
``separate``: the batch's statistics, running ones unchanged."""

AUTO = "auto"
"""A step of min(1, 2.5 / steps) epsilon: 2.5 epsilon / steps reaches the other side of the ball (arXiv:1706.06083,
section 5); the limit of epsilon matters below three steps."""


def number(default: float, *, low: float, high: float, integer: bool = False, above: bool = False) -> Any:
    """A settings field: a number from ``low`` (``above``: over it) to ``high``; ``integer``: an integer."""
    return _checked(default, partial(number_errors, low=low, high=high, integer=integer, above=above))


def size(default: str | float, *, words: tuple[str, ...] = (), least: float = 0.0) -> Any:
    """A settings field: one of ``words``, or a length such as ``2/255``, over 0 and at least ``least``."""

    def errors(key: str, value: str | float) -> list[str]:
        if value in words:
            return []
        alternatives = "".join(f"'{word}' or " for word in words)
        try:
            found = parse_epsilon(value)
        except UsageError:
            return [f"{key} = {shown(value)} is not {alternatives}a number from 0 to 1, such as 2/255"]
        # 1e-7: float32 images cannot resolve less.
        if found == 0.0 or found < least - 1e-7:
            wanted = f"at least {round(least * 255)}/255" if least else "over 0"
            return [f"{key} = {shown(value)} must be {alternatives}{wanted}"]
        return []

    return _checked(default, errors)


def choice(default: str, known: Sequence[str], *, positive_number: bool = False) -> Any:
    """A settings field: one of the ``known`` words, or a positive number if that is allowed."""

    def errors(key: str, value: object) -> list[str]:
        if positive_number and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return []
        return [] if value in known else [unknown_value(key, value, known)]

    return _checked(default, errors)


def path() -> Any:
    """A settings field: the path of a file; empty: none."""
    return _checked("", lambda key, value: [] if isinstance(value, str) else [f"{key} = {shown(value)} is not a path"])


def _checked(default: Any, errors: Callable[[str, Any], list[str]]) -> Any:
    return field(default=default, metadata={"errors": errors})


def bn_mode(default: str) -> Any:
    """A settings field: BatchNorm's mode during attack generation, one of :data:`BATCH_NORM_MODES`."""
    return choice(default, BATCH_NORM_MODES)
