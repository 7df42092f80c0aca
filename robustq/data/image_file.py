"""Reading one image file, with errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robustq.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# What Pillow calls pixels of more than 8 bits. It would turn them into 8 bits by clipping, which makes them white.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def image_header(path: str | Path) -> tuple[str, tuple[int, int]]:
    """Pillow's mode ("L", "RGB", ...) and (width, height) of an image file, read without decoding its pixels.

    Raises:
        DataError: no readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except Exception as error:  # on a broken file Pillow raises whatever its decoder meets (OSError, SyntaxError, ...)
        raise _unreadable(path, error) from error


def read_image(path: str | Path, *, channels: int) -> Image.Image:
    """Decode an image file into 8-bit grey (`channels` 1) or RGB (3); transparency is dropped.

    Raises:
        DataError: no readable image, or one of more than 8 bits per channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            decoded = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if mode in DEEP_MODES:
        raise DataError(f"{path} has more than 8 bits per channel (Pillow's mode {mode}); convert it to 8 bits first")
    return decoded


def _unreadable(path: str | Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} cannot be read as an image ({reason}); replace or remove it, or add --skip-bad-images")
