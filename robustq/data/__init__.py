"""Data sets: by name, from an `.npz` file, or from a folder of images.

Every set is a `Dataset` of three splits (train, holdout, test), whose batches are images float32 in [0, 1], NCHW, and
labels int64 (N,). Small sets live as one uint8 tensor on the compute device (`TensorSplit`); large folders are decoded
while they are used (`StreamedSplit`).

The split of an image is fixed: no seed changes it. Order and augmentation of a training epoch are a pure function of
(seed, epoch), so that a resumed run needs no generator state.
"""

from __future__ import annotations

from robustq.data.augment import NO_AUGMENT, Augment, to_float
from robustq.data.dataset import Dataset
from robustq.data.load import DATASET_NAMES, KNOWN, load_dataset, usual_augment
from robustq.data.splits import Batch, Split, TensorSplit
from robustq.data.streamed import StreamedSplit

__all__ = [
    "DATASET_NAMES",
    "KNOWN",
    "NO_AUGMENT",
    "Augment",
    "Batch",
    "Dataset",
    "Split",
    "StreamedSplit",
    "TensorSplit",
    "load_dataset",
    "to_float",
    "usual_augment",
]
