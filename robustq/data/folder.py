"""Folders of images in torchvision's ImageFolder layout: one folder per class, class names sorted."""

from __future__ import annotations

import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustq.data.dataset import Dataset, assemble, training_indices
from robustq.data.splits import TensorSplit, split_by_name
from robustq.data.streamed import StreamedSplit, default_workers, image_header, read_image
from robustq.errors import DataError, RobustqWarning
from robustq.progress import bar

STREAM_ABOVE_BYTES = 1 << 30
"""A folder with more bytes than this, as uint8 at the network's image size, is streamed."""

IMAGENET_SIZE = 224

MOST_FOLDERS = 10_000
"""Folders of one class: links may lead out of the data set to a whole disk."""


PARTS = (("train", "training"), ("test", "testing", "val", "valid", "validation"))
"""Names of the folders of the training and of the test part, in any case; the first that is there counts."""


@dataclass(frozen=True)
class _Files:
    """Image files and the class of each, int64 (N,)."""

    paths: list[str]
    labels: Tensor

    def subset(self, indices: Tensor) -> _Files:
        return _Files([self.paths[index] for index in indices.tolist()], self.labels[indices])


def load_folder(folder: Path, *, train_images: int, image_size: int | None, skip_bad_images: bool) -> Dataset:
    """A data set from FOLDER/train/<class>/* and FOLDER/test (or val)/<class>/*, else from FOLDER/<class>/*, of which a
    fifth becomes the test part (see `splits.split_by_name`). Other names of the two parts are in :data:`PARTS`.

    One channel when every image is grey (Pillow's mode L), else RGB. Small sets are decoded once: shorter side scaled
    to the image size, centre cropped. Large sets are streamed (see `StreamedSplit`).

    Raises:
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
        files = _image_files(folder, class_names, skip_bad_images, {})
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

    def split(files: _Files) -> TensorSplit | StreamedSplit:
        if total * channels * side**2 > STREAM_ABOVE_BYTES:
            return StreamedSplit(files.paths, files.labels, image_size=side, channels=channels)
        # With a shorter side of the image size, images of this size are not changed.
        decoded = StreamedSplit(files.paths, files.labels, image_size=side, channels=channels, shorter_side=side)
        return TensorSplit(*decoded.take(0))

    parts = [split(files) for files in (train.subset(kept), train.subset(held), test)]
    return Dataset(str(folder.resolve()), tuple(map(_as_text, class_names)), channels, side, *parts)


def load_imagenet(root: Path, *, train_images: int, image_size: int | None, skip_bad_images: bool) -> Dataset:
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
    return assemble(
        StreamedSplit(train.paths, train.labels, image_size=side),
        StreamedSplit(test.paths, test.labels, image_size=side),
        train_images=train_images,
        name="imagenet",
        class_names=imagenet_class_names(folder_names),
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
) -> tuple[tuple[str, ...], _Files, _Files]:
    """Class names, training files and test files; the test part may lack classes of the training part."""
    class_names = class_folders(train_folder)
    unknown = sorted(set(class_folders(test_folder)) - set(class_names))
    if unknown:
        raise DataError(f"{test_folder} has the class {unknown[0]}, which {train_folder} lacks; remove or add it")
    places: dict[str, str] = {}
    train = _image_files(train_folder, class_names, skip_bad_images, places)
    return class_names, train, _image_files(test_folder, class_names, skip_bad_images, places, every=False)


def _image_files(
    folder: Path, class_names: tuple[str, ...], skip_bad_images: bool, places: dict[str, str], *, every: bool = True
) -> _Files:
    """All image files below the class folders, class by class, sorted.

    With `every`, as for training, a class without images is an error, and so is a single class. `places`: see
    :func:`_files_below`.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if every and len(class_names) < 2:
        raise DataError(
            f"{folder} has one class only ({class_names[0]}); a classifier needs at least two class folders"
        )
    samples = [
        (path, number)
        for number, name in enumerate(class_names)
        if (folder / name).is_dir()
        for path in _files_below(folder / name, IMG_EXTENSIONS, places)
    ]
    if skip_bad_images:
        samples = _readable(samples, folder)
    labels = torch.tensor([number for _, number in samples], dtype=torch.int64)
    empty = sorted(set(range(len(class_names))) - set(labels.tolist()))
    if not samples or (every and empty):
        where = folder / class_names[empty[0]] if samples else folder
        raise DataError(f"{where} has no images; file names must end in one of {' '.join(IMG_EXTENSIONS)}")
    return _Files([path for path, _ in samples], labels)


def _files_below(folder: Path, extensions: tuple[str, ...], places: dict[str, str]) -> list[str]:
    """Image files below a class folder, sorted by folder and name; links are followed.

    A folder or file that links lead to more than once counts once, also where a link leads back into its own folder.

    Args:
        folder: the class folder.
        extensions: of image files.
        places: real path of an image -> its class folder, for all class folders; extended.

    Raises:
        DataError: a folder cannot be read, an image belongs to another class folder too, or links lead to more than
            :data:`MOST_FOLDERS` folders.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = deque([str(folder)])
    while waiting:
        inner = waiting.popleft()
        real = os.path.realpath(inner)
        if real in seen:
            continue
        seen.add(real)
        if len(seen) > MOST_FOLDERS:
            raise DataError(f"{folder} has links to over {MOST_FOLDERS:,} folders, such as {inner}; remove the link")
        try:
            for entry in sorted(os.scandir(inner), key=lambda entry: entry.name):
                if entry.is_dir():
                    # Folders before links, so that an image keeps its own name.
                    (waiting.append if entry.is_symlink() else waiting.appendleft)(entry.path)
                elif entry.name.lower().endswith(extensions):
                    place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    found.setdefault(place, entry.path)
        except OSError as error:
            raise DataError(f"{error.filename or inner} cannot be read: {error.strerror}") from error
    for place, path in found.items():
        if places.setdefault(place, str(folder)) != str(folder):
            raise DataError(f"{path} is also an image of {places[place]}; remove the link")
    return sorted(found.values(), key=os.path.split)


def _readable(samples: list[tuple[str, int]], folder: Path) -> list[tuple[str, int]]:
    """The image files that decode; a warning names the others. Every file is decoded once."""

    def is_readable(path: str) -> bool:
        try:
            read_image(path, channels=3)
        except DataError:
            return False
        return True

    good: list[tuple[str, int]] = []
    bad: list[tuple[str, int]] = []
    # Threads: Pillow decodes without Python's lock.
    with ThreadPoolExecutor(default_workers()) as pool, bar(f"check {folder.name}", len(samples)) as progress:
        try:
            for sample, readable in zip(samples, pool.map(is_readable, [path for path, _ in samples]), strict=True):
                (good if readable else bad).append(sample)
                progress.advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all files
            raise
    if bad:
        names = ", ".join(path for path, _ in bad[:5]) + (", ..." if len(bad) > 5 else "")
        warnings.warn(f"skipped {len(bad)} of {len(samples)} images that cannot be read: {names}", RobustqWarning, 2)
    return good


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
                f"{'' if side is None else f', others {side}x{side}'}); scale them, or set image_size (32, 224, ...)"
            )
        side = width if image_size is None else image_size
    if side is None:
        raise DataError(f"{folder} has no images")
    return channels, side
