"""A data set with its three splits: training, hold-out and test images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.data.splits import HOLDOUT_SEED, SUBSET_SEED, Split, TensorSplit, stratified_indices, stratified_split
from robustq.data.streamed import StreamedSplit
from robustq.errors import DataError, UsageError

HOLDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Dataset:
    """A data set, ready for training and testing.

    `name`: the known name, or the absolute path of the file or folder; it loads the same set again.
    `image_size`: side of the square images in pixels.
    `holdout`: images taken out of the training part to monitor training; `test` is for the final numbers only.
    `resize`: how image files became square (see `data.resize`); None for sets whose images are used as they are.
    `skip_bad_images`: whether unreadable image files were left out.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    train: Split
    holdout: Split
    test: Split
    resize: str | None = None
    skip_bad_images: bool = False

    @property
    def classes(self) -> int:
        """Number of classes, at least 2."""
        return len(self.class_names)

    def digest(self) -> str:
        """A hash of all images, labels and class names; their path takes no part."""
        parts = [*self.class_names, *(split.digest() for split in (self.train, self.holdout, self.test))]
        return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def training_indices(
    labels: Tensor, train_images: int, *, name: str, class_names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, and of the hold-out: int64, increasing, disjoint.

    The hold-out is a fixed stratified tenth of the whole training part. It does not depend on `train_images`, so that
    no run trains on the hold-out images of another run.

    Args:
        labels: int64 (N,) of the whole training part.
        train_images: number of training images, class shares kept, every class present; 0 for all.
        name, class_names: the data set's, for the messages.

    Raises:
        UsageError: a negative number.
        DataError: one class only, one image per class, or a number that the data set cannot give.
    """
    if len(set(labels.tolist())) < 2:
        raise DataError(f"{name} has training images of one class only ({class_names[int(labels[0])]}); need two")
    rest, held = stratified_split(labels, HOLDOUT_SHARE, seed=HOLDOUT_SEED)
    if len(held) == 0:
        raise DataError(
            f"{name} has one training image per class ({len(labels)} in all), so none can be held out; use more images"
        )
    return rest[_subset(labels[rest], train_images, name=name)], held


def _subset(labels: Tensor, train_images: int, *, name: str) -> Tensor:
    if train_images < 0:
        raise UsageError(f"train_images is {train_images}; give a positive number, or 0 for all")
    if train_images == 0:
        return torch.arange(len(labels))
    classes = len(set(labels.tolist()))
    if not classes <= train_images <= len(labels):
        raise DataError(
            f"train_images is {train_images}, but {name} has {len(labels)} training images in {classes} classes beside "
            f"the held-out ones; give {classes} to {len(labels)}, or 0 for all"
        )
    return stratified_indices(labels, train_images, at_least=1, spare=0, seed=SUBSET_SEED)


def assemble(
    train: TensorSplit | StreamedSplit,
    test: Split,
    *,
    train_images: int,
    name: str,
    class_names: tuple[str, ...],
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """A data set whose hold-out and training images are taken out of `train` (see `training_indices`)."""
    kept, held = training_indices(train.labels, train_images, name=name, class_names=class_names)
    parts = train.subset(kept), train.subset(held), test
    return Dataset(name, class_names, train.channels, train.image_size, *parts, resize, skip_bad_images)
