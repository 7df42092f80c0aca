"""The data sets: by name, from an `.npz` file, or from a folder of images.

Every set becomes a `Dataset` of three splits (train, holdout, test). A split hands out batches as the models want them:
images float32 in [0, 1], NCHW; labels int64 (N,). Small sets live as one uint8 tensor on the compute device
(`TensorSplit`) and are augmented there; large folders are decoded while they are used (`StreamedSplit`).

Which image belongs to which split is fixed: no seed of the user moves it. Order and augmentation of a training epoch
are a pure function of (seed, epoch), so a resumed run needs no generator state.
"""

from __future__ import annotations

from robustq.data.augment import NO_AUGMENT, Augment, to_float, usual_augment
from robustq.data.dataset import Dataset
from robustq.data.load import DATASET_NAMES, SIDES, load_dataset
from robustq.data.splits import Batch, Split, TensorSplit
from robustq.data.streamed import StreamedSplit

__all__ = [
    "DATASET_NAMES",
    "NO_AUGMENT",
    "SIDES",
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
