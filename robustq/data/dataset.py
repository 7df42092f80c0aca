"""A data set in three splits, and the two choices that every set shares: training subset and hold-out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.data.splits import Split, TensorSplit
from robustq.data.stratify import HOLDOUT_SEED, SUBSET_SEED, count_classes, stratified_parts, stratified_places
from robustq.data.streamed import StreamedSplit
from robustq.errors import DataError, UsageError

HOLDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to train and to test on.

    `name` loads the same set again: the known name, or the absolute path of the file or folder. `image_size` is the
    side of the square images in pixels. `holdout` was taken out of the training part to watch training; `test` is for
    the final numbers only.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    train: Split
    holdout: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of classes, at least 2."""
        return len(self.class_names)


def training_subset(labels: Tensor, train_images: int, *, name: str) -> Tensor:
    """Places of the `train_images` training images to keep, class shares kept, every class present; all for 0.

    Args:
        labels: int64 (N,) of the whole training part.
        train_images: how many to keep.
        name: the data set's, for the message.

    Raises:
        UsageError: a negative number.
        DataError: more than there are, or fewer than there are classes.
    """
    if train_images < 0:
        raise UsageError(f"train_images is {train_images}; give a positive number, or 0 for all")
    if train_images == 0:
        return torch.arange(len(labels))
    classes = count_classes(labels)
    if not classes <= train_images <= len(labels):
        raise DataError(
            f"train_images is {train_images}, but {name} has {len(labels)} training images in {classes} classes; give "
            f"{classes} to {len(labels)}, or 0 for all"
        )
    return stratified_places(labels, train_images, at_least=1, spare=0, seed=SUBSET_SEED)


def assemble(
    train: TensorSplit | StreamedSplit,
    test: Split,
    *,
    name: str,
    class_names: tuple[str, ...],
    channels: int,
    image_size: int,
) -> Dataset:
    """Take the hold-out, a fixed stratified tenth, out of `train`, and put the data set together.

    Raises:
        DataError: training labels of one class only, or a training part that is too small to give anything away.
    """
    if count_classes(train.labels) < 2:
        raise DataError(f"{name} has training images of one class only ({class_names[int(train.labels[0])]}); need two")
    rest, held = stratified_parts(train.labels, HOLDOUT_SHARE, seed=HOLDOUT_SEED)
    if len(held) == 0:
        raise DataError(
            f"{name} has one training image per class ({len(train)} in all), so none can be held out; use more images"
        )
    return Dataset(name, class_names, channels, image_size, train.subset(rest), train.subset(held), test)
