"""The radius epsilon of the threat model: its default, parsing and printing."""

from __future__ import annotations

import math

from robustq.errors import UsageError

DEFAULT_EPSILON = 8 / 255
"""Without an option, recipe or model that sets a radius: the usual one for CIFAR-10."""


def parse_epsilon(value: float | str) -> float:
    """A radius in [0, 1] from a number, ``"8/255"`` or ``"0.03"``.

    Raises:
        UsageError: not a number, NaN, negative, over 1, or a division by zero.
    """
    text = f"'{value}'" if isinstance(value, str) else str(value)
    advice = "give a number from 0 to 1, such as 8/255 or 0.03"
    if isinstance(value, bool):
        raise UsageError(f"epsilon {text} is not a number; {advice}")
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            number = float(numerator) / float(denominator)
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"epsilon {text} is not a number; {advice}") from error
    if not math.isfinite(number) or not 0.0 <= number <= 1.0:
        raise UsageError(f"epsilon {text} is outside [0, 1] (pixels are divided by 255); {advice}")
    return number


def format_epsilon(epsilon: float) -> str:
    """``8/255`` when the radius is a multiple of 1/255, else the number."""
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 else f"{epsilon:g}"
