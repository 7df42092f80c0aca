"""Splits of a data set: the fixed choice of images, and the split that lives in memory as one uint8 tensor."""

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

TEST_SHARE = 0.2
"""Test part of a set that has none of its own."""

# Constants: a seed of the user must not move an image from one part to another.
TEST_SEED, SUBSET_SEED, HOLDOUT_SEED = 1, 2, 3


def stratified_indices(labels: Tensor, count: int, *, at_least: int, spare: int, seed: int) -> Tensor:
    """Choose `count` images at random; every class keeps its share (largest remainder method).

    A class of n among N images gets n * count / N, rounded down; the missing images come from the classes that lost
    most by rounding (the lower label first).

    Args:
        labels: int64 (N,), on the CPU.
        count: number of images; fewer are chosen where `spare` does not allow so many.
        at_least: smallest number of images of each class (if it has them).
        spare: images of each class that are never chosen.
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
        # In integers (times N): equal classes tie exactly on every machine.
        lost = step * (sizes * count - quotas * len(labels))
        movable = quotas < high if step > 0 else quotas > low
        quotas[np.argmax(np.where(movable, lost, np.iinfo(np.int64).min))] += step
    # numpy promises that the numbers of RandomState never change.
    random = np.random.RandomState(seed)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1])
    chosen = [random.permutation(indices)[:quota] for indices, quota in zip(members, quotas, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def stratified_split(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split off `share` (0..1, at least one image) of the images, class shares kept; no class is emptied.

    Returns:
        indices of the rest and of the part: int64, increasing. The part is empty only when every class has one image.
    """
    part = stratified_indices(labels, max(1, round(len(labels) * share)), at_least=0, spare=1, seed=seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[part] = False
    return kept.nonzero().flatten(), part


def split_by_name(names: Sequence[str], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split off about a fifth (`TEST_SHARE`) of every class, chosen by a hash in [0, 1) of each file name.

    An image stays in its part when other files are added or removed. In every class the lowest hash belongs to the part
    and the highest to the rest, so only these images may move when their class grows. A class of one image stays whole.

    Args:
        names: of the files, relative to the data's folder: CLASS/FILE.
        labels: int64 (N,).

    Returns:
        indices of the rest and of the part: int64, increasing.
    """
    digests = [hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names]
    hashes = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    part = hashes < TEST_SHARE
    for label in np.unique(labels.numpy()):
        indices = np.flatnonzero(labels.numpy() == label)
        part[indices[hashes[indices].argmin()]] = True
        part[indices[hashes[indices].argmax()]] = False
    return torch.from_numpy(np.flatnonzero(~part)), torch.from_numpy(np.flatnonzero(part))


@dataclass(frozen=True)
class Batch:
    """Images of a split with their labels, on one device; it unpacks as the pair `x, y`.

    x: float32 in [0, 1], (B, C, H, W).
    y: int64 (B,).
    indices: int64 (B,), of the images in the split, for methods that keep values for each image.
    """

    x: Tensor
    y: Tensor
    indices: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for, as it would for one from pageable memory."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


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
        """Iterate once over the split; the last batch may be short.

        Args:
            batch_size: images per batch, at least 1.
            device: of the batches.
            seed: None: the split's own order and no augmentation. With a number, order and augmentation are a pure
                function of (seed, epoch): the same on every device, and per image the same for every batch size.
            epoch: the epoch's number, from 0.
            augment: used with a seed only.
            skip: batches to leave out at the start of the epoch, without reading them; the others do not change.

        Yields:
            A `Batch`; `for x, y in split.batches(...)` works too.

        Raises:
            UsageError: a batch size below 1.
        """
        ...

    def digest(self) -> str:
        """A hash of the images and labels in their order, by which a resumed run notices that its data changed."""
        ...

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` images at evenly spaced indices (all for n = 0 or n >= len): a split sorted by class gives every class.

        Returns:
            images uint8 (n, C, H, W) and labels int64 (n,), both on the CPU, in the split's order.
        """
        ...


def evenly_spaced(length: int, n: int) -> Tensor:
    """The indices floor(i * length / n), i = 0..n-1: int64; all for n = 0 or n >= length, UsageError for n < 0."""
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

    `images`: uint8 (N, C, H, W), `labels`: integers (N,), both on the CPU. DataError for no images, another dtype or
    shape, or another number of labels.
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
        self.channels, self.image_size = images.shape[1:3]
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> TensorSplit:
        """The images at `indices` (int64 (M,)) as a split of their own."""
        return TensorSplit(self.images[indices], self.labels[indices])

    def digest(self) -> str:
        """See `Split.digest`: pixels and labels."""
        digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """See `Split.take`."""
        indices = evenly_spaced(len(self), n)
        return self.images[indices], self.labels[indices]

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
        """See `Split.batches`. Random crops are taken after zero padding."""
        check_batch_size(batch_size)
        images, labels = self._on(device)
        order = torch.arange(len(self))
        offsets = flips = None
        if seed is not None:
            # Drawn for the whole epoch at once: the augmentation of an image does not depend on the batch size.
            generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
            order = torch.randperm(len(self), generator=generator)
            if augment != NO_AUGMENT:
                offsets, flips = draw_crops_and_flips(augment, len(self), generator=generator)
                offsets, flips = sent(offsets, images.device), sent(flips, images.device)
        order = sent(order, images.device)

        def generate() -> Iterator[Batch]:
            for indices in torch.split(order, batch_size)[skip:]:
                x = images[indices]
                if offsets is not None and flips is not None:
                    x = crop_and_flip(x, offsets[indices], flips[indices], padding=augment.crop_padding)
                yield Batch(to_float(x), labels[indices], indices)

        return generate()

    def _on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images and labels on `device`, copied there by the first call only."""
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" must not hold two copies
        if device not in self._copies:
            self._copies[device] = self.images.to(device), self.labels.to(device)
        return self._copies[device]
