"""The split that is too large for the memory: image files that are read, cropped and scaled batch by batch."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as IndexedImages

from robustq.data.augment import NO_AUGMENT, Augment, mixed_seed, to_float
from robustq.data.resize import SHORT_SIDE, SQUASH
from robustq.data.splits import Batch, check_batch_size, evenly_spaced, sent
from robustq.errors import DataError, one_line
from robustq.files import open_regular
from robustq.progress import bar

if TYPE_CHECKING:
    from PIL import Image

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of more than 8 bits, which it would convert by clipping: the image would turn white."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Image formats that are read. Pillow knows others, and runs Ghostscript on an EPS file whatever its name."""

LARGEST_IMAGE = 100_000_000
"""Pixels."""

TAKE_BATCH = 64
"""Images that a worker decodes at a time for `take`; changes no result."""


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        with open_regular(Path(path), error=DataError) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise DataError(f"{image.width}x{image.height} is more than {LARGEST_IMAGE:,} pixels")
            yield image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError and more on broken files
        raise DataError(
            f"{path} cannot be read as an image ({one_line(error)}); replace or remove it, or add --skip-bad-images"
        ) from error


def image_header(path: str | Path) -> tuple[str, tuple[int, int]]:
    """Pillow's mode ("L", "RGB", ...) and (width, height) of an image file as it is stored; it is not decoded.

    Raises:
        DataError: no readable image.
    """
    with _opened(path) as image:
        return image.mode, image.size


def read_image(path: str | Path, *, channels: int) -> Image.Image:
    """Decode an image file into 8-bit grey (`channels` 1) or RGB (3), turned as its EXIF data say.

    Transparency is dropped.

    Raises:
        DataError: no readable image, or one of more than 8 bits per channel.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        mode = image.mode
        decoded = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    if mode in DEEP_MODES:
        raise DataError(f"{path} has more than 8 bits per channel (Pillow's mode {mode}); convert it to 8 bits first")
    return decoded


def usual_shorter_side(image_size: int) -> int:
    """8/7 of the image size: 256 for 224, as is usual on ImageNet."""
    return round(image_size * 8 / 7)


def default_workers() -> int:
    """One process per CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StreamedSplit:
    """A split of image files, decoded by worker processes with torchvision's v2 transforms.

    Without augmentation the shorter side is scaled to `shorter_side` (bilinear, antialiased) and the centre is cropped;
    with `squash` both sides are scaled to `image_size`. A random crop is torchvision's RandomResizedCrop with its
    defaults, whatever the value of `crop_padding`, since photographs have no common size; with `squash` its shapes are
    those relative to the image's own.

    Every image is augmented with a seed made from (seed, epoch, index): the result depends neither on the number of
    workers nor on the batch size, and the process's own random state is kept.

    Args:
        paths: image files.
        labels: integers (N,), one per file.
        image_size: side of the square images in pixels.
        channels: 1 (grey) or 3 (RGB); files are converted.
        workers: processes; None for one per CPU; 0 decodes in this process.
        shorter_side: see above; None for 8/7 of `image_size` (256 for 224, as is usual on ImageNet).
        squash: see above; `shorter_side` has no effect then.

    Raises:
        DataError: no files, or another number of labels; while it is used: a file that is no readable 8-bit image.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Tensor,
        *,
        image_size: int,
        channels: int = 3,
        workers: int | None = None,
        shorter_side: int | None = None,
        squash: bool = False,
    ) -> None:
        if len(paths) == 0 or labels.shape != (len(paths),):
            raise DataError(f"{len(paths)} image files need as many labels and at least one, got {tuple(labels.shape)}")
        # An array: reading a list of strings changes their reference counts, which copies them into the memory of every
        # worker (https://github.com/pytorch/pytorch/issues/13246).
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = labels.to(torch.int64)
        self.image_size = image_size
        self.channels = channels
        self.workers = default_workers() if workers is None else workers
        self.shorter_side = usual_shorter_side(image_size) if shorter_side is None else shorter_side
        self.squash = squash

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def resize(self) -> str:
        """How images become square, as text: see `data.resize`."""
        return SQUASH if self.squash else f"{SHORT_SIDE}:{self.shorter_side}"

    def subset(self, indices: Tensor) -> StreamedSplit:
        """The images at `indices` (int64 (M,)) as a split of their own."""
        return StreamedSplit(
            [os.fsdecode(path) for path in self.paths[indices.numpy()]],
            self.labels[indices],
            image_size=self.image_size,
            channels=self.channels,
            workers=self.workers,
            shorter_side=self.shorter_side,
            squash=self.squash,
        )

    def digest(self) -> str:
        """See `Split.digest`: labels, file names with their class folders, and sizes, since pixels would take long.

        Raises:
            DataError: a file is gone.
        """
        usual = not self.squash and self.shorter_side == usual_shorter_side(self.image_size)
        about = (len(self), self.image_size, self.channels, *(() if usual else (self.resize,)))
        digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
        for path, label in zip(map(os.fsdecode, self.paths), self.labels.tolist(), strict=True):
            try:
                size = os.path.getsize(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            name = f"{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}"
            digest.update(f"{name}\0{size}\0{label}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """See `Split.take`; the images are not augmented."""
        indices = evenly_spaced(len(self), n)
        images = torch.empty(len(indices), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        start = 0
        with bar("read images", len(indices)) as progress:
            for batch in self._decode(indices, TAKE_BATCH, _ImageFiles(self, NO_AUGMENT, 0, 0)):
                images[start : start + len(batch)] = batch
                start += len(batch)
                progress.advance(len(batch))
        return images, self.labels[indices]

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
        """See `Split.batches`. A random crop is RandomResizedCrop.

        Raises:
            DataError: an image cannot be read (named).
        """
        check_batch_size(batch_size)
        device = torch.device(device)
        order = torch.arange(len(self))
        if seed is None:
            files = _ImageFiles(self, NO_AUGMENT, 0, epoch)
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
            files = _ImageFiles(self, augment, seed, epoch)
        order = order[skip * batch_size :]

        def generate() -> Iterator[Batch]:
            start = 0
            for batch in self._decode(order, batch_size, files, pin_memory=device.type == "cuda"):
                indices = order[start : start + len(batch)]
                x = to_float(batch.to(device, non_blocking=True))
                yield Batch(x, sent(self.labels[indices], device), sent(indices, device))
                start += len(batch)

        return generate()

    def _decode(
        self, order: Tensor, batch_size: int, files: _ImageFiles, *, pin_memory: bool = False
    ) -> Iterator[Tensor]:
        """Batches uint8 (B, C, S, S) of the images at `order`."""
        loader = DataLoader(
            files,
            batch_size,
            sampler=order.tolist(),
            num_workers=self.workers if len(order) > batch_size else 0,  # no processes for a single batch
            collate_fn=_stack,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # else the loader draws a seed from the process's generator
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


class _ImageFiles(IndexedImages[Tensor | str]):
    """The images of a split for DataLoader: index -> uint8 (C, S, S), or an error message."""

    def __init__(self, split: StreamedSplit, augment: Augment, seed: int, epoch: int) -> None:
        self.paths, self.channels = split.paths, split.channels
        self.side, self.shorter_side, self.squash = split.image_size, split.shorter_side, split.squash
        self.augment, self.seed, self.epoch = augment, seed, epoch

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = read_image(os.fsdecode(self.paths[index]), channels=self.channels)
        except DataError as error:
            return str(error)  # raised in a worker, it would reach the user with the worker's traceback
        if self.augment == NO_AUGMENT:
            return self._transformed(image)
        # The v2 transforms draw from the process's CPU generator only; `torch.manual_seed` would reseed CUDA too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, index))
            return self._transformed(image)

    def _transformed(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import v2

        if self.augment.crop_padding:
            shape = image.width / image.height if self.squash else 1.0
            steps = [v2.RandomResizedCrop(self.side, ratio=(0.75 * shape, shape / 0.75))]
        elif self.squash:
            steps = [v2.Resize((self.side, self.side))]
        else:
            steps = [v2.Resize(self.shorter_side), v2.CenterCrop(self.side)]
        if self.augment.flip:
            steps.append(v2.RandomHorizontalFlip())
        decoded: Tensor = v2.Compose([*steps, v2.PILToTensor()])(image)
        return decoded


def _ignore_ctrl_c(_: int) -> None:
    """Let the main process alone handle signals.

    A terminal sends Ctrl-C to every process, while the trainer still needs the batches of its workers. SIGTERM gets its
    default action, since forked workers inherit the trainer's handler.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stack(images: list[Tensor | str]) -> Tensor | str:
    """A batch uint8 (B, C, S, S), or the first error message among its images."""
    errors = [image for image in images if isinstance(image, str)]
    return errors[0] if errors else torch.stack([image for image in images if isinstance(image, Tensor)])
