"""Data sets that are read from disk batch by batch.

Reading one image file, with errors that name it.

The split that is too large to keep: images are read, cropped and scaled while they are needed.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as IndexedImages

from robustq.data.augment import NO_AUGMENT, Augment, mixed_seed, to_float
from robustq.data.splits import Batch, check_batch_size, evenly_spaced
from robustq.errors import DataError, UsageError
from robustq.progress import bar

if TYPE_CHECKING:
    from PIL import Image

# What Pillow calls pixels of more than 8 bits. It would turn them into 8 bits by clipping, which makes them white.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def image_header(path: str | Path) -> tuple[str, tuple[int, int]]:
    """Pillow's mode ("L", "RGB", ...) and (width, height) of an image file, read without decoding its pixels.

    Raises:
        DataError: no readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except Exception as error:  # on a broken file Pillow raises whatever its decoder meets (OSError, SyntaxError, ...)
        raise _unreadable(path, error) from error


def read_image(path: str | Path, *, channels: int) -> Image.Image:
    """Decode an image file into 8-bit grey (`channels` 1) or RGB (3); transparency is dropped.

    Raises:
        DataError: no readable image, or one of more than 8 bits per channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            decoded = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if mode in DEEP_MODES:
        raise DataError(f"{path} has more than 8 bits per channel (Pillow's mode {mode}); convert it to 8 bits first")
    return decoded


def _unreadable(path: str | Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} cannot be read as an image ({reason}); replace or remove it, or add --skip-bad-images")


TAKE_BATCH = 64  # images that a worker decodes at a time for `take`; changes no result


def default_workers() -> int:
    """One process per CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StreamedSplit:
    """A split of image files, decoded by worker processes with torchvision's v2 transforms.

    Without augmentation: the shorter side is scaled to `shorter_side` (bilinear, antialiased) and the middle is cut
    out. With augmentation, a random crop is torchvision's RandomResizedCrop with its default scale and ratio, whatever
    the value of `crop_padding` (photographs have no common size to pad), and a flip is a flip.

    Every image is augmented under a seed of its own, made from (seed, epoch, place in the split), so neither the number
    of workers nor the batch size changes what happens to it, and the process's own random state stays where it was.

    A broken image stops the run only when it is reached.

    Args:
        paths: image files.
        labels: integers (N,), one per file.
        image_size: side of the square images handed out, in pixels.
        channels: 1 (grey) or 3 (RGB); files are converted.
        workers: processes; None for one per CPU; 0 decodes in this process.
        shorter_side: see above; None for 8/7 of `image_size` (256 for 224, as is usual on ImageNet).

    Raises:
        DataError: no files, or another number of labels; while it is used: a file that is no readable 8-bit image.
        UsageError: a negative number of workers.
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
    ) -> None:
        if len(paths) == 0 or labels.shape != (len(paths),):
            raise DataError(f"{len(paths)} image files need as many labels and at least one, got {tuple(labels.shape)}")
        if workers is not None and workers < 0:
            raise UsageError(f"workers is {workers}; give a number of processes, 0 for none")
        # One array instead of a list: reading a list moves the reference counts of a million strings, which copies them
        # into the memory of every worker (https://github.com/pytorch/pytorch/issues/13246).
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = labels.to(torch.int64)
        self.image_size = image_size
        self.channels = channels
        self.workers = default_workers() if workers is None else workers
        self.shorter_side = round(image_size * 8 / 7) if shorter_side is None else shorter_side

    def __len__(self) -> int:
        return len(self._paths)

    def subset(self, places: Tensor) -> StreamedSplit:
        """The images at `places` (int64 (M,)) as a split of its own."""
        return StreamedSplit(
            [os.fsdecode(path) for path in self._paths[places.numpy()]],
            self.labels[places],
            image_size=self.image_size,
            channels=self.channels,
            workers=self.workers,
            shorter_side=self.shorter_side,
        )

    def digest(self) -> str:
        """See `Split.digest`: labels, file names with their class folders, sizes; reading every image would take long.

        Raises:
            DataError: a file is gone.
        """
        seen = hashlib.blake2b(repr((len(self), self.image_size, self.channels)).encode(), digest_size=16)
        for path, label in zip(map(os.fsdecode, self._paths), self.labels.tolist(), strict=True):
            try:
                size = os.path.getsize(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            name = f"{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}"
            seen.update(f"{name}\0{size}\0{label}\0".encode(errors="surrogateescape"))
        return seen.hexdigest()

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """See `Split.take`; the images come without augmentation."""
        places = evenly_spaced(len(self), n)
        images = torch.empty(len(places), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        start = 0
        with bar("read images", len(places)) as progress:
            for batch in self._decode(places, TAKE_BATCH, self._files(None, 0, NO_AUGMENT)):
                images[start : start + len(batch)] = batch
                start += len(batch)
                progress.advance(len(batch))
        return images, self.labels[places]

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
        place = torch.device(device)
        order = torch.arange(len(self))
        if seed is not None:
            generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
            order = torch.randperm(len(self), generator=generator)
        order = order[skip * batch_size :]
        files = self._files(seed, epoch, augment)

        def generate() -> Iterator[Batch]:
            start = 0
            for batch in self._decode(order, batch_size, files, pin_memory=place.type == "cuda"):
                places = order[start : start + len(batch)]
                x = to_float(batch.to(place, non_blocking=True))
                yield Batch(x, self.labels[places].to(place), places.to(place))
                start += len(batch)

        return generate()

    def _files(self, seed: int | None, epoch: int, augment: Augment) -> _ImageFiles:
        augment = NO_AUGMENT if seed is None else augment
        return _ImageFiles(self._paths, self.channels, self.image_size, self.shorter_side, augment, seed or 0, epoch)

    def _decode(
        self, order: Tensor, batch_size: int, files: _ImageFiles, *, pin_memory: bool = False
    ) -> Iterator[Tensor]:
        """Batches uint8 (B, C, S, S) of the images at `order`."""
        loader = DataLoader(
            files,
            batch_size,
            sampler=order.tolist(),
            # One batch is not worth starting processes for.
            num_workers=self.workers if len(order) > batch_size else 0,
            collate_fn=_stack,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_main_process,
            # Without one of its own the loader draws its workers' seed from the process's generator.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


class _ImageFiles(IndexedImages[Tensor | str]):
    """The files as the workers see them: place -> uint8 (C, S, S), or the message of an error."""

    def __init__(
        self,
        paths: np.ndarray[tuple[int], np.dtype[np.bytes_]],
        channels: int,
        image_size: int,
        shorter_side: int,
        augment: Augment,
        seed: int,
        epoch: int,
    ) -> None:
        from torchvision.transforms import v2

        if augment.crop_padding:
            steps = [v2.RandomResizedCrop(image_size)]
        else:
            steps = [v2.Resize(shorter_side), v2.CenterCrop(image_size)]
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose([*steps, v2.PILToTensor()])
        self.paths, self.channels, self.augment, self.seed, self.epoch = paths, channels, augment, seed, epoch

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Tensor | str:
        try:
            image = read_image(os.fsdecode(self.paths[place]), channels=self.channels)
        except DataError as error:
            # As a value: raised in a worker, it would reach the user with the worker's traceback in its message.
            return str(error)
        if self.augment == NO_AUGMENT:
            decoded: Tensor = self.transform(image)
            return decoded
        # The v2 transforms draw from the process's CPU generator only. `torch.manual_seed` would reseed CUDA too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, place))
            decoded = self.transform(image)
        return decoded


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C reaches every process of a terminal: a worker that died of it would take the batch along that the trainer
    still wants to finish. Forked workers inherit the trainer's own handlers, so the usual end by SIGTERM is put back.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stack(images: list[Tensor | str]) -> Tensor | str:
    """A batch uint8 (B, C, S, S), or the first error message among its images."""
    decoded = []
    for image in images:
        if isinstance(image, str):
            return image
        decoded.append(image)
    return torch.stack(decoded)
