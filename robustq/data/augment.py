"""Augmentation of a whole batch at once: every image has its own crop and its own flip, and no loop visits images.

The usual CIFAR augmentation (He et al., arXiv:1512.03385, section 4.2): zero padding, a random crop of the original
size, a horizontal flip with probability 1/2.
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
    """What may happen to a training image.

    `crop_padding`: zero pixels added on every side before a crop of the original size at a random place (0: no crop).
    `flip`: mirror left and right with probability 1/2.

    Raises:
        UsageError: a negative padding.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding is {self.crop_padding}; give a number of pixels, 0 for no crop")


NO_AUGMENT = Augment()

_MIRRORED = frozenset({"cifar10", "cifar100", "fashion-mnist", "imagenet"})
"""Named sets whose pictures may be mirrored."""


def usual_augment(name: str, image_size: int) -> Augment:
    """What is usual for the data set called `name` with images of `image_size` pixels a side: crops padded by an eighth
    of the side, flips of photographs.

    Digits and the user's own data are not mirrored: a mirrored digit is another sign.
    """
    return Augment(crop_padding=image_size // 8, flip=name in _MIRRORED)


def to_float(images: Tensor) -> Tensor:
    """Pixels as the models want them: uint8 0..255 (any shape) to float32 in [0, 1], pixel / 255, same device."""
    # A divisor that lies on the device: for a Python number CUDA multiplies by the rounded reciprocal instead, so that
    # some pixels would differ from the CPU's in the last bit.
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, such as (seed, epoch); neighbouring tuples get unrelated streams."""
    # A hash of the text: (1, 0) and (1, 0, 0) differ, and the value is the same on every machine and version.
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_crops_and_flips(augment: Augment, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the augmentation of `count` images on the CPU, so that it is the same on every device.

    Returns:
        offsets int64 (count, 2), row and column of the crop's corner in the padded image, each 0..2 * crop_padding;
        flips bool (count,).
    """
    offsets = torch.randint(0, 2 * augment.crop_padding + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5 if augment.flip else torch.zeros(count, dtype=torch.bool)
    return offsets, flips


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, *, padding: int) -> Tensor:
    """Crop each zero-padded image at its own offset, then mirror the ones that `flips` marks: one gather per batch.

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
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    return padded.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)
