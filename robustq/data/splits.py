"""What a split of a data set can do, and the split that lives as one uint8 tensor on the compute device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustq.data.augment import NO_AUGMENT, Augment, crop_and_flip, draw_crops_and_flips, mixed_seed, to_float
from robustq.errors import DataError, UsageError


@dataclass(frozen=True)
class Batch:
    """Images of a split with their labels; it unpacks as the pair `x, y`.

    x: float32 in [0, 1], (B, C, H, W).
    y: int64 (B,).
    places: int64 (B,), where the images stand in the split, for methods that remember something about each image.
    All three lie on the same device.
    """

    x: Tensor
    y: Tensor
    places: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


class Split(Protocol):
    """One part of a data set."""

    @property
    def labels(self) -> Tensor:
        """Class of every image: int64 (N,), on the CPU, in the split's order."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int | None = None,
        epoch: int = 0,
        augment: Augment = NO_AUGMENT,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Go once through the split, a short last batch included.

        Args:
            batch_size: images per batch, at least 1.
            device: where the batches are needed.
            seed: None for the split's own order and no augmentation at all, whatever `augment` says. With a number, the
                order and every augmentation draw are a pure function of (seed, epoch): the same on every device, and
                per image the same for every batch size.
            epoch: the epoch's number, from 0.
            augment: what may happen to the images when there is a seed.
            skip: batches to leave out at the start of the epoch, without reading them; the others stay what they are.

        Yields:
            A `Batch` on `device`; `for x, y in split.batches(...)` works too.

        Raises:
            UsageError: a batch size below 1.
        """
        ...

    def digest(self) -> str:
        """A short name of what the split holds, in its order: it tells a resumed run whether its data changed."""
        ...

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` images at evenly spaced places (all for n = 0 or n >= len), so that a split sorted by class gives every
        class. Always the same ones.

        Returns:
            images uint8 (n, C, H, W) and labels int64 (n,), both on the CPU, in the split's order.
        """
        ...


def evenly_spaced(length: int, n: int) -> Tensor:
    """The places floor(i * length / n), i = 0..n-1: int64, increasing, from 0; every place for n = 0 or n >= length.

    Raises:
        UsageError: a negative n.
    """
    if n < 0:
        raise UsageError(f"cannot take {n} images; give a positive number, or 0 for all")
    if n == 0 or n >= length:
        return torch.arange(length)
    return torch.arange(n) * length // n


def check_batch_size(batch_size: int) -> None:
    """Raises UsageError for a batch size below 1."""
    if batch_size < 1:
        raise UsageError(f"batch size is {batch_size}; give at least 1")


class TensorSplit:
    """A split that fits into memory: one uint8 tensor, copied to a compute device once and augmented there.

    Args:
        images: uint8 (N, C, H, W) on the CPU.
        labels: integers (N,); kept as int64 on the CPU.

    Raises:
        DataError: no images, another dtype or shape, or another number of labels.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise DataError(
                f"images must be uint8 with shape (N, C, H, W) and N > 0, got {images.dtype} {tuple(images.shape)}"
            )
        if labels.shape != (len(images),):
            raise DataError(f"{len(images)} images need labels with shape ({len(images)},), got {tuple(labels.shape)}")
        self.images = images
        self.labels = labels.to(torch.int64)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, places: Tensor) -> TensorSplit:
        """The images at `places` (int64 (M,)) as a split of its own."""
        return TensorSplit(self.images[places], self.labels[places])

    def digest(self) -> str:
        """See `Split.digest`: pixels and labels."""
        seen = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        seen.update(self.images.contiguous().numpy().data)
        seen.update(self.labels.contiguous().numpy().data)
        return seen.hexdigest()

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """See `Split.take`."""
        places = evenly_spaced(len(self), n)
        return self.images[places], self.labels[places]

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int | None = None,
        epoch: int = 0,
        augment: Augment = NO_AUGMENT,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """See `Split.batches`. A random crop is one after zero padding."""
        check_batch_size(batch_size)
        images, labels = self._on(device)
        order = torch.arange(len(self))
        offsets = flips = None
        if seed is not None:
            # Everything is drawn for the whole epoch before the first batch: what happens to an image does not depend
            # on the batch size, and an iterator that is dropped early leaves nothing half drawn.
            generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
            order = torch.randperm(len(self), generator=generator)
            if augment != NO_AUGMENT:
                offsets, flips = draw_crops_and_flips(augment, len(self), generator=generator)
                offsets, flips = offsets.to(images.device), flips.to(images.device)
        order = order.to(images.device)

        def generate() -> Iterator[Batch]:
            for places in torch.split(order, batch_size)[skip:]:
                x = images[places]
                if offsets is not None and flips is not None:
                    x = crop_and_flip(x, offsets[places], flips[places], padding=augment.crop_padding)
                yield Batch(to_float(x), labels[places], places)

        return generate()

    def _on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images and labels on `device`, copied there by the first call only."""
        # An empty tensor tells the device's full name: "cuda" and "cuda:0" must not hold two copies.
        place = torch.empty(0, device=device).device
        if place not in self._copies:
            self._copies[place] = self.images.to(place), self.labels.to(place)
        return self._copies[place]
