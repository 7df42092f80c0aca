"""Splits and subsets.

Choosing images class by class: the fixed test part, hold-out and training subset of a data set.

What a split of a data set can do, and the split that lives as one uint8 tensor on the compute device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robustq.data.augment import NO_AUGMENT, Augment, crop_and_flip, draw_crops_and_flips, mixed_seed, to_float
from robustq.errors import DataError, UsageError

# The test part of a set that comes without one.
TEST_SHARE = 0.2

# Constants on purpose: a seed of the user must not move an image from one part to another.
TEST_SEED, SUBSET_SEED, HOLDOUT_SEED = 1, 2, 3


def count_classes(labels: Tensor) -> int:
    """How many different labels there are."""
    return len(np.unique(labels.numpy()))


def stratified_places(labels: Tensor, count: int, *, at_least: int, spare: int, seed: int) -> Tensor:
    """Choose `count` images so that every class keeps its share as exactly as whole images allow.

    Largest remainder: a class of n among N images gets n * count / N rounded down, and what is missing goes to the
    classes that lost most by rounding (the lower label first). For one seed a smaller choice lies within a larger one
    wherever its class quotas do.

    Args:
        labels: int64 (N,), on the CPU.
        count: how many; fewer are chosen when `spare` does not allow so many.
        at_least: images that each class gets whatever its share (if it has them).
        spare: images that each class keeps out of the choice.
        seed: of the choice within each class.

    Returns:
        int64 (count,), increasing.
    """
    _, which, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    high = np.maximum(sizes - spare, 0)
    low = np.minimum(at_least, high)
    count = min(max(count, int(low.sum())), int(high.sum()))
    quotas = np.clip(sizes * count // len(labels), low, high)
    while quotas.sum() != count:
        step = 1 if quotas.sum() < count else -1
        # In integers (times N), so that equal classes tie exactly on every machine.
        lost = step * (sizes * count - quotas * len(labels))
        movable = quotas < high if step > 0 else quotas > low
        quotas[np.argmax(np.where(movable, lost, np.iinfo(np.int64).min))] += step
    # RandomState, the legacy generator, is the one whose stream numpy promises never to change.
    random = np.random.RandomState(seed)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1])
    chosen = [random.permutation(places)[:quota] for places, quota in zip(members, quotas, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def stratified_parts(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Part `share` (0..1, at least one image) of every class from the rest; no class is emptied by it.

    Returns:
        places of the rest and of the part: int64, increasing. The part is empty only when every class has one image.
    """
    part = stratified_places(labels, max(1, round(len(labels) * share)), at_least=0, spare=1, seed=seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[part] = False
    return kept.nonzero().flatten(), part


def named_parts(names: Sequence[str], labels: Tensor) -> tuple[Tensor, Tensor]:
    """About a fifth (`TEST_SHARE`) of every class from the rest, chosen by a hash of each file's name.

    An image stays in its part whatever is added or removed beside it. Only where a class has no image below the fifth
    the lowest hash stands in, and where it has nothing else the highest stays in the rest: such an image may move when
    its class grows. A class of one image gives nothing.

    Args:
        names: of the files, relative to the data's folder: CLASS/FILE.
        labels: int64 (N,).

    Returns:
        places of the rest and of the part: int64, increasing.
    """
    shares = np.array([_share(name) for name in names])
    part = shares < TEST_SHARE
    for label in np.unique(labels.numpy()):
        places = np.flatnonzero(labels.numpy() == label)
        lowest, highest = places[shares[places].argmin()], places[shares[places].argmax()]
        part[lowest] = True
        part[highest] = False
    return torch.from_numpy(np.flatnonzero(~part)), torch.from_numpy(np.flatnonzero(part))


def _share(name: str) -> float:
    """A number in [0, 1) from a name, the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


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
