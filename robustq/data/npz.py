"""Data sets in one `.npz` file, as Keras keeps them: x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustq.data.dataset import Dataset, assemble
from robustq.data.splits import TensorSplit
from robustq.errors import DataError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, *, train_images: int) -> Dataset:
    """A data set from an `.npz` file; its classes are called "0", "1", ...

    The arrays: x_* uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3) with H = W; y_* of any integer type, (N,) or (N, 1),
    from 0. Pickled objects are never loaded, since loading them can run a stranger's code.

    Raises:
        DataError: not a whole .npz file, an array that is missing, pickled, empty, or of another type or shape, another
            number of labels than images, a negative label, labels that leave no sense as class numbers, test images of
            another size, or a test label that training lacks.
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
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        raise DataError(f"y_test of {path} has the label {unknown[0]}, which y_train lacks; test on training classes")
    return assemble(
        train,
        test,
        train_images=train_images,
        name=str(path.resolve()),
        class_names=tuple(str(label) for label in range(highest + 1)),
        channels=train.images.shape[1],
        image_size=train.images.shape[2],
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as file:
            whole = zipfile.is_zipfile(file)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    if not whole:
        raise DataError(f"{path} is not a whole .npz file (truncated, or something else); write it with numpy.savez")
    arrays = {}
    try:
        archive = np.load(path, allow_pickle=False)
        names = archive.files
    except Exception as error:  # numpy and zipfile raise whatever they meet in a broken archive
        raise DataError(f"{path} cannot be read as .npz ({_reason(error)}); write it with numpy.savez") from error
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
            except Exception as error:  # as above, pickled arrays and wrong checksums included
                raise DataError(
                    f"{name} of {path} cannot be read ({_reason(error)}); write plain integer arrays with numpy.savez"
                ) from error
            if not isinstance(arrays[name], np.ndarray):  # numpy hands out the bytes of what is no array
                raise DataError(f"{name} of {path} is not an array; write plain integer arrays with numpy.savez")
    return arrays


def _split(path: Path, part: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> TensorSplit:
    """Checks one pair of arrays; the messages name the array and what it is."""
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
    if int(y.min()) < 0:
        raise DataError(f"y_{part} of {path} has the label {y.min()}; number the classes from 0")
    if int(y.max()) > np.iinfo(np.int64).max:
        raise DataError(f"y_{part} of {path} has the label {y.max()}; number the classes from 0")
    images = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return TensorSplit(images, _labels(y))


def _labels(y: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(y.reshape(-1).astype(np.int64))


def _reason(error: Exception) -> str:
    """An exception's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
