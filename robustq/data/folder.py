"""Folders of images in torchvision's ImageFolder layout: one folder per class, class names sorted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from robustq.data.dataset import Dataset, assemble, training_indices
from robustq.data.image_files import ImageFiles, image_files
from robustq.data.resize import SQUASH, shorter_side_of
from robustq.data.splits import TensorSplit, split_by_name
from robustq.data.streamed import StreamedSplit, image_header
from robustq.errors import DataError

STREAM_ABOVE_BYTES = 1 << 30
"""A folder with more bytes than this, as uint8 at the network's image size, is streamed."""

IMAGENET_SIZE = 224

PARTS = (("train", "training"), ("test", "testing", "val", "valid", "validation"))
"""Names of the folders of the training and of the test part, in any case; the first that is there counts."""


def load_folder(
    folder: Path,
    *,
    train_images: int,
    image_size: int | None,
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """A data set from FOLDER/train/<class>/* and FOLDER/test (or val)/<class>/*, else from FOLDER/<class>/*, of which a
    fifth becomes the test part (see `splits.split_by_name`). Other names of the two parts are in :data:`PARTS`.

    One channel when every image is grey (Pillow's mode L), else RGB. Small sets are decoded once; without `resize` the
    shorter side is scaled to the image size and the centre cropped. Large sets are streamed (see `StreamedSplit`).

    Raises:
        UsageError: `resize` has no form of `data.resize`, or is smaller than the images.
        DataError: no images, fewer than two classes, a class of the test part that training lacks, an unreadable image,
            only one of train and test, or images that are not all of one square size while `image_size` is None.

    Warns:
        RobustqWarning: unreadable images were left out, with `skip_bad_images`.
    """
    train_folder, test_folder = (_part_folder(folder, names) for names in PARTS)
    if train_folder is not None and test_folder is not None:
        class_names, train, test = _two_folders(train_folder, test_folder, skip_bad_images)
    elif present := train_folder or test_folder:
        raise DataError(
            f"{folder} has {present.name} but not {'train' if train_folder is None else 'test or val'}; give both, or "
            "class folders only, of which a fixed fifth becomes the test part"
        )
    else:
        class_names = class_folders(folder)
        files = image_files(folder, class_names, skip_bad_images, {})
        rest, part = split_by_name(
            [Path(os.path.relpath(path, folder)).as_posix() for path in files.paths], files.labels
        )
        if len(part) == 0:
            raise DataError(f"{folder} has one image per class, so none can be set apart for testing; add images")
        train, test = files.subset(rest), files.subset(part)
    # Of all images: the training subset must not decide between grey and RGB.
    channels, side = _channels_and_side(train.paths + test.paths, folder, image_size)
    kept, held = training_indices(train.labels, train_images, name=str(folder), class_names=class_names)
    total = len(kept) + len(held) + len(test.paths)

    streams = total * channels * side**2 > STREAM_ABOVE_BYTES
    # With a shorter side of the image size, images of this size are not changed.
    shorter_side = shorter_side_of(resize, image_size=side) or (None if streams else side)
    options: dict[str, Any] = {"image_size": side, "shorter_side": shorter_side, "squash": resize == SQUASH}
    parts = [
        StreamedSplit(files.paths, files.labels, channels=channels, **options)
        for files in (train.subset(kept), train.subset(held), test)
    ]
    kept_train, holdout, kept_test = parts if streams else [TensorSplit(*part.take(0)) for part in parts]
    return Dataset(
        name=str(folder.resolve()),
        class_names=tuple(map(_as_text, class_names)),
        channels=channels,
        image_size=side,
        train=kept_train,
        holdout=holdout,
        test=kept_test,
        resize=parts[0].resize,
        skip_bad_images=skip_bad_images,
    )


def load_imagenet(
    root: Path,
    *,
    train_images: int,
    image_size: int | None,
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """ImageNet from ROOT/imagenet/{train,val}/<class>/*: RGB, streamed, by default 224 pixels.

    Its 1,000 usual folders (n01440764, ...) get their English names.

    Raises:
        DataError: the folders are absent, or as `load_folder`.
    """
    train_folder, test_folder = root / "imagenet" / "train", root / "imagenet" / "val"
    if not train_folder.is_dir() or not test_folder.is_dir():
        raise DataError(
            f"imagenet is not in {train_folder} and {test_folder} (one folder of images per class); put it there (it "
            "cannot be downloaded), set ROBUSTQ_DATA to where it lies, or pass --data FOLDER"
        )
    folder_names, train, test = _two_folders(train_folder, test_folder, skip_bad_images)
    side = IMAGENET_SIZE if image_size is None else image_size
    shorter_side = shorter_side_of(resize, image_size=side)
    options: dict[str, Any] = {"image_size": side, "shorter_side": shorter_side, "squash": resize == SQUASH}
    split = StreamedSplit(train.paths, train.labels, **options)
    return assemble(
        split,
        StreamedSplit(test.paths, test.labels, **options),
        train_images=train_images,
        name="imagenet",
        class_names=imagenet_class_names(folder_names),
        resize=split.resize,
        skip_bad_images=skip_bad_images,
    )


def _part_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    try:  # of two names that differ in case alone, the lower-case one
        found = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    return next((found[name] for name in names if name in found), None)


def _as_text(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 become the replacement character."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted, without hidden folders (.ipynb_checkpoints, ...).

    Raises:
        DataError: none, or `folder` cannot be read.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"{folder} has no class folders; put the images of each class into {folder}/<class>/")
    return tuple(names)


def imagenet_class_names(folder_names: tuple[str, ...]) -> tuple[str, ...]:
    """English names for ImageNet's 1,000 WordNet folders, in their sorted order; other names are kept."""
    from torchvision.models import ResNet18_Weights

    names: list[str] = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if len(folder_names) != len(names) or not all(name[0] == "n" and name[1:].isdigit() for name in folder_names):
        return folder_names
    return tuple(names)


def _two_folders(
    train_folder: Path, test_folder: Path, skip_bad_images: bool
) -> tuple[tuple[str, ...], ImageFiles, ImageFiles]:
    """Class names, training files and test files; the test part may lack classes of the training part."""
    class_names = class_folders(train_folder)
    unknown = sorted(set(class_folders(test_folder)) - set(class_names))
    if unknown:
        raise DataError(f"{test_folder} has the class {unknown[0]}, which {train_folder} lacks; remove or add it")
    places: dict[str, str] = {}
    train = image_files(train_folder, class_names, skip_bad_images, places)
    return class_names, train, image_files(test_folder, class_names, skip_bad_images, places, every=False)


def _channels_and_side(paths: list[str], folder: Path, image_size: int | None) -> tuple[int, int]:
    """Channels (1 when all images are grey, else 3) and side of the images, from the headers of as few files as do."""
    channels, side = 1, image_size
    for path in paths:
        if channels == 3 and image_size is not None:
            break
        mode, (width, height) = image_header(path)
        channels = channels if mode == "L" else 3
        if image_size is None and (width != height or side not in (None, width)):
            raise DataError(
                f"the images in {folder} are not all of one square size ({path} is {width}x{height}"
                f"{'' if side is None else f', others {side}x{side}'}); scale them, or give the side of the "
                "square images: --set image_size=64, with --resize short-side (centre crop) or squash (whole image)"
            )
        side = width if image_size is None else image_size
    if side is None:
        raise DataError(f"{folder} has no images")
    return channels, side
