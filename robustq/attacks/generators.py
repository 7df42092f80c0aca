"""Random numbers that belong to an image: the same ones whichever images share its batch, or have left it.

A generator hands its numbers out in the order of asking, so that an image which drops out of a batch would move the
numbers of all that follow. Here every image has a key, and a number is a hash of key and position (a counter-based
generator, Salmon et al. 2011, doi:10.1145/2063384.2063405; the hash is the finalizer of SplitMix64, Steele et al. 2014,
doi:10.1145/2660193.2660195). All numbers of a batch are made by one vectorised expression of wrapping int64 arithmetic
on the CPU, hence bitwise the same everywhere.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from robustq.errors import UsageError


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


class ImageGenerators:
    """One independent stream of random numbers per image. A value: asked again, it gives the same numbers.

    Ask a `child` for other numbers (of the next restart, of the next step), and index it for fewer images.

    Args:
        keys: (N,) int64 on the CPU, one per image; `ImageGenerators.of` makes good ones.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def of(cls, seed: int, numbers: Tensor | range, *, attack: str = "") -> ImageGenerators:
        """The streams of images by their number in the data set.

        Args:
            seed: of the whole evaluation.
            numbers: (N,) integers, where each image stands in the data set; equal numbers get equal streams.
            attack: its name, so that attacks do not share their draws.
        """
        numbers = torch.as_tensor(list(numbers) if isinstance(numbers, range) else numbers).to("cpu", torch.int64)
        return cls(_mix(_mix(numbers * _GOLDEN) + _word("seed", seed))).child(attack)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Tensor | slice) -> ImageGenerators:
        """The streams of some of the images: a slice, a bool mask (N,), or indices (n,), on any device."""
        return ImageGenerators(self.keys[rows if isinstance(rows, slice) else rows.cpu()])

    def child(self, *labels: int | str) -> ImageGenerators:
        """Independent streams of the same images, one for each sequence of labels."""
        keys = self.keys
        for label in labels:
            keys = _mix(_mix(keys) + _word("child", label))
        return ImageGenerators(keys)

    def bits(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) int64 on the CPU, all 64 bits random."""
        counters = torch.arange(1, math.prod(shape) + 1) * _GOLDEN
        return _mix(self.keys[:, None] + counters).reshape(len(self), *shape)

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32 on the CPU: multiples of 2^-24 in [0, 1)."""
        return _unsigned_shift(self.bits(shape), 40).to(torch.float32) * 2.0**-24

    def signs(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32 on the CPU: -1 or +1, equally likely."""
        return (self.bits(shape) >> 63).to(torch.float32) * 2.0 + 1.0

    def integers(self, high: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) int64 on the CPU, uniform over 0 .. high - 1 (up to one part in 2^32 / high).

        Args:
            high: 1 to 2^31, one number or a CPU tensor that broadcasts to the result.
            shape: per image.
        """
        return (_unsigned_shift(self.bits(shape), 32) * high) >> 32

    def normal(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32 on the CPU, standard normal (Box and Muller 1958)."""
        first, second = (_unsigned_shift(self.bits((*shape, 2)), 11).to(torch.float64) * 2.0**-53).unbind(-1)
        return ((-2.0 * (1.0 - first).log()).sqrt() * (2.0 * math.pi * second).cos()).to(torch.float32)


def image_generators(generator: torch.Generator | ImageGenerators | None, x: Tensor) -> ImageGenerators:
    """The streams of a batch: those that were given, or new ones from one draw of the generator.

    Args:
        generator: streams, a CPU generator, or None for the global CPU generator.
        x: (N, ...), the images of the batch.

    Raises:
        UsageError: streams of another number of images.
    """
    if isinstance(generator, ImageGenerators):
        if len(generator) != len(x):
            raise UsageError(f"{len(generator)} random streams and {len(x)} images; give one stream per image")
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return ImageGenerators.of(seed, range(len(x)))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words in which each input bit moves half of the output bits."""
    z = (z ^ _unsigned_shift(z, 30)) * _FIRST
    z = (z ^ _unsigned_shift(z, 27)) * _SECOND
    return z ^ _unsigned_shift(z, 31)


def _unsigned_shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; int64's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _word(kind: str, label: int | str) -> int:
    """64 bits for a label; numbers and texts never meet, since Python writes them differently."""
    digest = hashlib.blake2b(f"{kind} {label!r}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))
