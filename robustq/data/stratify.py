"""Choosing images class by class: the fixed test part, hold-out and training subset of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The test part of a set that comes without one.
TEST_SHARE = 0.2

# Constants on purpose: a seed of the user must not move an image from one part to another.
TEST_SEED, SUBSET_SEED, HOLDOUT_SEED = 1, 2, 3


def count_classes(labels: Tensor) -> int:
    """How many different labels there are."""
    return len(np.unique(labels.numpy()))


def stratified_places(labels: Tensor, count: int, *, at_least: int, spare: int, seed: int) -> Tensor:
    """Choose `count` images so that every class keeps its share as exactly as whole images allow.

    Largest remainder: a class of n among N images gets n * count / N rounded down, and what is missing goes to the
    classes that lost most by rounding (the lower label first). For one seed a smaller choice lies within a larger one
    wherever its class quotas do.

    Args:
        labels: int64 (N,), on the CPU.
        count: how many; fewer are chosen when `spare` does not allow so many.
        at_least: images that each class gets whatever its share (if it has them).
        spare: images that each class keeps out of the choice.
        seed: of the choice within each class.

    Returns:
        int64 (count,), increasing.
    """
    _, which, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    high = np.maximum(sizes - spare, 0)
    low = np.minimum(at_least, high)
    count = min(max(count, int(low.sum())), int(high.sum()))
    quotas = np.clip(sizes * count // len(labels), low, high)
    while quotas.sum() != count:
        step = 1 if quotas.sum() < count else -1
        # In integers (times N), so that equal classes tie exactly on every machine.
        lost = step * (sizes * count - quotas * len(labels))
        movable = quotas < high if step > 0 else quotas > low
        quotas[np.argmax(np.where(movable, lost, np.iinfo(np.int64).min))] += step
    # RandomState, the legacy generator, is the one whose stream numpy promises never to change.
    random = np.random.RandomState(seed)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1])
    chosen = [random.permutation(places)[:quota] for places, quota in zip(members, quotas, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def stratified_parts(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Part `share` (0..1, at least one image) of every class from the rest; no class is emptied by it.

    Returns:
        places of the rest and of the part: int64, increasing. The part is empty only when every class has one image.
    """
    part = stratified_places(labels, max(1, round(len(labels) * share)), at_least=0, spare=1, seed=seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[part] = False
    return kept.nonzero().flatten(), part


def named_parts(names: Sequence[str], labels: Tensor) -> tuple[Tensor, Tensor]:
    """About a fifth (`TEST_SHARE`) of every class from the rest, chosen by a hash of each file's name.

    An image stays in its part whatever is added or removed beside it. Only where a class has no image below the fifth
    the lowest hash stands in, and where it has nothing else the highest stays in the rest: such an image may move when
    its class grows. A class of one image gives nothing.

    Args:
        names: of the files, relative to the data's folder: CLASS/FILE.
        labels: int64 (N,).

    Returns:
        places of the rest and of the part: int64, increasing.
    """
    shares = np.array([_share(name) for name in names])
    part = shares < TEST_SHARE
    for label in np.unique(labels.numpy()):
        places = np.flatnonzero(labels.numpy() == label)
        lowest, highest = places[shares[places].argmin()], places[shares[places].argmax()]
        part[lowest] = True
        part[highest] = False
    return torch.from_numpy(np.flatnonzero(~part)), torch.from_numpy(np.flatnonzero(part))


def _share(name: str) -> float:
    """A number in [0, 1) from a name, the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
