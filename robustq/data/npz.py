"""Data sets in one `.npz` file, as in Keras: x_train, y_train, x_test, y_test."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustq.data.dataset import Dataset, assemble
from robustq.data.splits import TensorSplit
from robustq.errors import DataError, RobustqWarning, one_line
from robustq.files import open_regular

ARRAYS = ("x_train", "y_train", "x_test", "y_test")

LARGEST_RATIO, UNSUSPICIOUS_SIZE = 100, 256 << 20
"""Compression of arrays, and bytes unpacked up to which it does not matter. Zip packs zeros a thousandfold."""


def load_npz(path: Path, *, train_images: int) -> Dataset:
    """A data set from an `.npz` file; its classes are called "0", "1", ...

    x_*: uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3) with H = W; y_*: any integer type, (N,) or (N, 1), from 0.
    Pickled objects are never loaded, since loading them can run foreign code.

    Raises:
        DataError: not a whole .npz file, an array that is missing, pickled, empty, or of another type or shape, another
            number of labels than images, invalid labels, or test images or labels that do not fit the training part.

    Warns:
        RobustqWarning: no training image has the label 0.
    """
    arrays = _read_arrays(path)
    train, test = (_split(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"x_train and x_test of {path} differ in channels or size: images of shape {arrays['x_train'].shape[1:]} "
            f"and {arrays['x_test'].shape[1:]}; make them alike"
        )
    highest = int(train.labels.max())
    if highest >= len(train):
        raise DataError(f"y_train of {path} has the label {highest} for {len(train)} images; number the classes from 0")
    if not bool((train.labels == 0).any()):
        warnings.warn(
            f"y_train of {path} has no label 0, so that class 0 stays empty; number the classes from 0",
            RobustqWarning,
            2,
        )
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        raise DataError(f"y_test of {path} has the label {unknown[0]}, which y_train lacks; test on training classes")
    return assemble(
        train,
        test,
        train_images=train_images,
        name=str(path.resolve()),
        class_names=tuple(str(label) for label in range(highest + 1)),
    )


def check_unpacked_size(path: Path) -> None:
    """Refuse an archive that a few bytes fill the memory from.

    Raises:
        ValueError: it unpacks to far more than its size.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > max(UNSUSPICIOUS_SIZE, LARGEST_RATIO * path.stat().st_size):
        raise ValueError(f"it unpacks to {unpacked:,} bytes, over {LARGEST_RATIO} times its size")


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with open_regular(path, error=DataError) as file:
        whole = zipfile.is_zipfile(file)
    if not whole:
        raise DataError(f"{path} is not a whole .npz file (truncated, or something else); write it with numpy.savez")
    arrays = {}
    try:
        check_unpacked_size(path)
        archive = np.load(path, allow_pickle=False)
        names = archive.files
    except Exception as error:  # numpy and zipfile raise many types for a broken archive
        raise DataError(f"{path} cannot be read as .npz ({one_line(error)}); write it with numpy.savez") from error
    with archive:
        missing = [name for name in ARRAYS if name not in names]
        if missing:
            raise DataError(
                f"{path} lacks {', '.join(missing)} (it holds {', '.join(names) or 'nothing'}); "
                f"it needs {', '.join(ARRAYS)}"
            )
        for name in ARRAYS:
            try:
                arrays[name] = archive[name]
            except Exception as error:  # as above, also for pickled arrays and wrong checksums
                raise DataError(
                    f"{name} of {path} cannot be read ({one_line(error)}); write plain integer arrays with numpy.savez"
                ) from error
            if not isinstance(arrays[name], np.ndarray):  # numpy returns the bytes of other content
                raise DataError(f"{name} of {path} is not an array; write plain integer arrays with numpy.savez")
    return arrays


def _split(path: Path, part: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> TensorSplit:
    """Check one pair of arrays and convert it."""
    if x.dtype != np.uint8:
        raise DataError(f"x_{part} of {path} is {x.dtype}; save the pixels as uint8, 0..255")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise DataError(f"x_{part} of {path} has shape {x.shape}; it needs (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    if 0 in x.shape:
        raise DataError(f"x_{part} of {path} holds no images (shape {x.shape})")
    if x.shape[1] != x.shape[2]:
        raise DataError(f"x_{part} of {path} has images of {x.shape[1]}x{x.shape[2]} pixels; they must be square")
    if y.dtype.kind not in "iu":
        raise DataError(f"y_{part} of {path} is {y.dtype}; save the labels as integers")
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] != 1):
        raise DataError(f"y_{part} of {path} has shape {y.shape}; it needs (N,) or (N, 1)")
    if len(x) != len(y):
        raise DataError(f"{path} has {len(x)} images in x_{part} but {len(y)} labels in y_{part}")
    for label in (int(y.min()), int(y.max())):
        if not 0 <= label <= np.iinfo(np.int64).max:
            raise DataError(f"y_{part} of {path} has the label {label}; number the classes from 0")
    images = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return TensorSplit(images, torch.from_numpy(y.reshape(-1).astype(np.int64)))
