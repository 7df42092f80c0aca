"""The image files of a data set's folder, class by class; links are followed, unreadable files may be left out."""

from __future__ import annotations

import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustq.data.streamed import default_workers, read_image
from robustq.errors import DataError, RobustqWarning
from robustq.progress import bar

MOST_FOLDERS = 10_000
"""Folders of one class: links may lead out of the data set to a whole disk."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files and the class of each, int64 (N,)."""

    paths: list[str]
    labels: Tensor

    def subset(self, indices: Tensor) -> ImageFiles:
        """Those at ``indices``, int64 (M,)."""
        return ImageFiles([self.paths[index] for index in indices.tolist()], self.labels[indices])


def image_files(
    folder: Path, class_names: tuple[str, ...], skip_bad_images: bool, places: dict[str, str], *, every: bool = True
) -> ImageFiles:
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
    return ImageFiles([path for path, _ in samples], labels)


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
