"""Loading a data set by name (embedded or downloaded), or from an .npz file or a folder of images."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustq.data.augment import Augment
from robustq.data.dataset import Dataset, assemble
from robustq.data.folder import IMAGENET_SIZE, load_folder, load_imagenet
from robustq.data.npz import load_npz
from robustq.data.resize import shorter_side_of
from robustq.data.splits import TEST_SEED, TEST_SHARE, TensorSplit, stratified_split
from robustq.errors import DataError, UsageError, one_line
from robustq.progress import Bar, bar, note


@dataclass(frozen=True)
class Known:
    """A data set that has a name."""

    side: int  # of the images, in pixels
    torchvision: str | None = None  # class of torchvision.datasets
    photographs: bool = False  # mirror images are images of the same class, so that training flips


KNOWN = {
    "digits": Known(8),
    "mnist": Known(28, "MNIST"),
    "fashion-mnist": Known(28, "FashionMNIST", photographs=True),
    "cifar10": Known(32, "CIFAR10", photographs=True),
    "cifar100": Known(32, "CIFAR100", photographs=True),
    "imagenet": Known(IMAGENET_SIZE, photographs=True),
}
"""Name -> data set."""

DATASET_NAMES = tuple(KNOWN)

LARGEST_SIDE = 4096


def usual_augment(name: str, image_size: int) -> Augment:
    """The usual augmentation of a data set: padding by an eighth of the side, and flips for photographs.

    Digits and the user's own data are not flipped: a mirrored digit is another sign.
    """
    return Augment(crop_padding=image_size // 8, flip=name in KNOWN and KNOWN[name].photographs)


def load_torchvision_parts(name: str, root: Path) -> list[Any]:
    """Torchvision's training and test part of the set called `name`, downloaded below `root` on first use.

    Raises:
        DataError: it is not there and cannot be downloaded.
    """
    from torchvision import datasets

    kind = getattr(datasets, str(KNOWN[name].torchvision))
    try:
        # torchvision prints during a download; stdout is for the result (--json).
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return [kind(root=str(root), train=train, download=False) for train in (True, False)]
            except RuntimeError:  # not found, or incomplete
                return _download(kind, name, root)
    except Exception as error:  # URL, socket, archive and checksum errors share no base class
        raise DataError(
            f"{name} could neither be read from {root} nor downloaded to it ({one_line(error)}); pass --data FILE.npz "
            "or --data FOLDER (of images) instead"
        ) from error


def _download(kind: Any, name: str, root: Path) -> list[Any]:
    note(f"data    downloading {name} to {root}")
    root.mkdir(parents=True, exist_ok=True)
    # A temporary folder: an interrupted download leaves no partial archive behind.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        with _replaced_tqdm(name):
            parts = [kind(root=folder, train=train, download=True) for train in (True, False)]
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                target = root / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    return parts


@contextlib.contextmanager
def _replaced_tqdm(name: str) -> Iterator[None]:
    """Replace torchvision's tqdm bar, which it always draws, by ours."""
    from torchvision.datasets import utils

    tqdm = getattr(utils, "tqdm", None)

    class OurBar:
        """The part of tqdm that torchvision uses; in kB."""

        def __init__(self, total: int | None = None, **_: Any) -> None:
            self._stack = contextlib.ExitStack()
            self._total = (total or 0) / 1000
            self._bar: Bar | None = None

        def __enter__(self) -> OurBar:
            self._bar = self._stack.enter_context(bar(f"download {name}", self._total, "kB"))
            return self

        def update(self, count: int) -> None:
            if self._bar is not None:
                self._bar.advance(count / 1000)

        def __exit__(self, *_: object) -> None:
            self._stack.close()

    if tqdm is None:
        yield
        return
    utils.tqdm = OurBar
    try:
        yield
    finally:
        utils.tqdm = tqdm


def load_dataset(
    name_or_path: str,
    *,
    train_images: int = 0,
    image_size: int | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """Load a data set; the same call always gives the same images in the same three splits.

    Downloads, and `imagenet`, lie in $ROBUSTQ_DATA, else in ~/.cache/robustq.

    Args:
        name_or_path: one of `DATASET_NAMES`, an `.npz` file (`npz.load_npz`) or a folder of images
            (`folder.load_folder`). A name wins over a folder of that name; write ./digits for the folder.
        train_images: number of training images, class shares kept; the hold-out does not change; 0 for all.
        image_size: side of the square images in pixels, for folders and `imagenet`; other sets have their own.
        resize: how images of folders and `imagenet` become square: see `data.resize`; None: shorter side and centre.
        skip_bad_images: leave out unreadable image files with a warning, instead of refusing the folder.

    Raises:
        DataError: unknown name, missing or broken file, a failed download, or data unfit for classification.
        UsageError: a negative number, or `resize` of another form, or for data whose images are used as they are.
    """
    shorter_side_of(resize, image_size=image_size)
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        raise UsageError(
            f"image_size is {image_size}; give the side of the square images in pixels, from 1 to {LARGEST_SIDE}"
        )
    options: dict[str, Any] = {
        "train_images": train_images,
        "image_size": image_size,
        "resize": resize,
        "skip_bad_images": skip_bad_images,
    }
    if name_or_path == "imagenet":
        return load_imagenet(data_root(), **options)
    if name_or_path == "digits":
        dataset = _load_digits(train_images)
    elif name_or_path in KNOWN:
        dataset = _load_torchvision(name_or_path, data_root(), train_images)
    else:
        # os.path never raises here, whatever was typed; Path does.
        path = Path(os.path.expanduser(name_or_path))
        if not name_or_path or not os.path.exists(path):
            raise _not_found(name_or_path)
        if path.is_dir():
            return load_folder(path, **options)
        if path.suffix.lower() != ".npz":
            raise DataError(f"{path} is neither a folder of images nor an .npz file; give one of these")
        dataset = load_npz(path, train_images=train_images)
    if resize is not None:
        raise UsageError(f"resize is '{resize}', but the images of {name_or_path} are used as they are; leave it out")
    if image_size not in (None, dataset.image_size):
        raise DataError(
            f"image_size is {image_size}, but {name_or_path} has images of {dataset.image_size}x{dataset.image_size} "
            "pixels, which are used as they are; leave it out"
        )
    return dataset


def data_root() -> Path:
    """$ROBUSTQ_DATA, else ~/.cache/robustq."""
    return Path(os.environ.get("ROBUSTQ_DATA") or "~/.cache/robustq").expanduser()


def _not_found(value: str) -> DataError:
    looks_like_path = "/" in value or os.sep in value or value.startswith((".", "~")) or value.lower().endswith(".npz")
    if looks_like_path:
        return DataError(f"{value} does not exist; --data takes a folder of images, an .npz file, or a data set's name")
    near = difflib.get_close_matches(value.lower(), DATASET_NAMES, n=1)
    return DataError(
        f"no data set is called {value!r}{f', did you mean {near[0]}' if near else ''}? Known are "
        f"{', '.join(DATASET_NAMES)}; a FOLDER of images or a FILE.npz that exists is taken as well"
    )


def _load_digits(train_images: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey: 0..16 scaled to 0..255; 1,438 to train, 359 to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8)[:, None]
    whole = TensorSplit(images, torch.from_numpy(bunch.target))
    rest, part = stratified_split(whole.labels, TEST_SHARE, seed=TEST_SEED)
    return assemble(
        whole.subset(rest),
        whole.subset(part),
        train_images=train_images,
        name="digits",
        class_names=tuple("0123456789"),
    )


def _load_torchvision(name: str, root: Path, train_images: int) -> Dataset:
    """One of torchvision's small sets, downloaded to `root` on first use; its own training and test parts."""
    parts = load_torchvision_parts(name, root)
    train, test = (
        TensorSplit(_channels_first(torch.as_tensor(part.data)), torch.as_tensor(part.targets)) for part in parts
    )
    class_names = tuple(class_name.partition(" - ")[0] for class_name in parts[0].classes)  # MNIST: "0 - zero"
    return assemble(train, test, train_images=train_images, name=name, class_names=class_names)


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
