"""Small images for the tests of data: splits, .npz files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustq.data import Augment, Split, StreamedSplit, TensorSplit

BOTH = Augment(crop_padding=2, flip=True)


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tensor_split(count: int = 23, channels: int = 3, side: int = 6) -> TensorSplit:
    # Image i holds the value i in its first pixel and is unique, so that a batch tells which images it holds.
    images = torch.from_numpy(pixels(count, channels, side, side))
    images[:, 0, 0, 0] = torch.arange(count, dtype=torch.uint8)
    return TensorSplit(images, torch.arange(count) % 5)


def write_images(
    folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0
) -> Path:
    """COUNTS[name] images of (width, height) `size` in folder/name, 00.png, 01.png, ..."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shape = (count, size[1], size[0], *([3] if mode == "RGB" else []))
        for number, image in enumerate(pixels(*shape, seed=100 * seed + place)):
            Image.fromarray(image).save(folder / name / f"{number:02}.png")
    return folder


def streamed(folder: Path, *, workers: int = 0, channels: int = 3, **options: Any) -> StreamedSplit:
    """24 images of 16x12 in two classes, made into 7x7."""
    if not folder.exists():
        write_images(folder, {"cat": 14, "dog": 10}, size=(16, 12))
    paths = sorted(folder.rglob("*.png"))
    labels = torch.tensor([int(path.parent.name == "dog") for path in paths])
    return StreamedSplit(paths, labels, image_size=7, channels=channels, workers=workers, **options)


def gather(split: Split, batch_size: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*split.batches(batch_size, device="cpu", **options), strict=True)  # a batch unpacks as x, y
    return torch.cat(xs), torch.cat(ys)


def write_npz(path: Path, **changes: Any) -> Path:
    """A good file of 40 + 8 images, 4 classes, 6x6 RGB, with the named arrays replaced; None leaves one out."""
    arrays: dict[str, Any] = {
        "x_train": pixels(40, 6, 6, 3),
        "y_train": np.arange(40) % 4,
        "x_test": pixels(8, 6, 6, 3, seed=1),
        "y_test": np.arange(8) % 4,
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path
