"""Augmentation of whole batches: every image has its own crop and flip, without a loop over images.

Random crops of the zero-padded image and horizontal flips, as in He et al., arXiv:1512.03385, section 4.2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustq.errors import UsageError


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images; UsageError for a negative padding."""

    crop_padding: int = 0  # zero pixels added on every side before a random crop of the original size; 0: no crop
    flip: bool = False  # mirror left and right with probability 1/2

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding is {self.crop_padding}; give a number of pixels, 0 for no crop")


NO_AUGMENT = Augment()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 (any shape) to float32 in [0, 1]: pixel / 255, on the same device."""
    # For a Python number CUDA multiplies by the rounded reciprocal, so that some pixels would differ from the CPU's in
    # the last bit: hence a divisor on the device.
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, such as (seed, epoch); the same on every machine and version."""
    # A hash of the text: (1, 0) and (1, 0, 0) differ, and neighbours get unrelated random numbers.
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_crops_and_flips(augment: Augment, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw offsets and flips of `count` images for `crop_and_flip`, on the CPU: the same for every device."""
    offsets = torch.randint(0, 2 * augment.crop_padding + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5 if augment.flip else torch.zeros(count, dtype=torch.bool)
    return offsets, flips


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, *, padding: int) -> Tensor:
    """Crop each zero-padded image at its own offset, then mirror the images marked by `flips`.

    Args:
        images: (N, C, H, W), any dtype.
        offsets: int64 (N, 2), row and column, each 0..2 * padding, on the images' device.
        flips: bool (N,), on the images' device.
        padding: zero pixels added on every side.

    Returns:
        (N, C, H, W), dtype of `images`.
    """
    channels, height, width = images.shape[1:]
    padded = functional.pad(images, (padding,) * 4)
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
    columns = offsets[:, 1, None] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    indices = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    return padded.flatten(2).gather(2, indices.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)
