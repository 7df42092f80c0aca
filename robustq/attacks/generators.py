"""Random numbers that belong to an image: the same ones whichever images share its batch, or have left it.

Every image has a key, and a number is a hash of key and position (a counter-based generator, Salmon et al. 2011,
doi:10.1145/2063384.2063405; the hash is the finalizer of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195).
All numbers of a batch come from one vectorised expression of wrapping int64 arithmetic on the device of the keys, and
are bitwise the same everywhere.

Training needs no number per image: `draw_generator` gives torch's own generator of a device.
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
    """One independent generator per image. It has no state: the same call gives the same numbers again.

    Use a `child` for other numbers (of the next restart, of the next step), and an index for some of the images. The
    keys are (N,) int64, one per image, on the device of all draws; `ImageGenerators.of` makes good ones.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def of(cls, seed: int, indices: Tensor | range, *, attack: str = "") -> ImageGenerators:
        """The generators of images by their index in the data set, (N,) integers; equal ones get equal generators.

        They draw on the device of the indices.
        ``seed`` is that of the whole evaluation; by the name of the ``attack`` attacks do not share their draws.
        """
        indices = torch.as_tensor(list(indices) if isinstance(indices, range) else indices).to(torch.int64)
        return cls(_mix(_mix(indices * _GOLDEN) + _word("seed", seed))).child(attack)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Tensor | slice) -> ImageGenerators:
        """The generators of some of the images: a slice, a bool mask (N,), or indices (n,), on any device."""
        return ImageGenerators(self.keys[rows if isinstance(rows, slice) else rows.to(self.keys.device)])

    def to(self, device: torch.device) -> ImageGenerators:
        """The same generators, which draw on ``device``."""
        return self if self.keys.device == device else ImageGenerators(self.keys.to(device))

    def child(self, *labels: int | str) -> ImageGenerators:
        """Other generators of the same images, independent for each sequence of labels."""
        keys = self.keys
        for label in labels:
            keys = _mix(_mix(keys) + _word("child", label))
        return ImageGenerators(keys)

    def bits(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) int64, all 64 bits random."""
        counters = torch.arange(1, math.prod(shape) + 1, device=self.keys.device) * _GOLDEN
        return _mix(self.keys[:, None] + counters).reshape(len(self), *shape)

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32: multiples of 2^-24 in [0, 1)."""
        return _unsigned_shift(self.bits(shape), 40).to(torch.float32) * 2.0**-24

    def signs(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32: -1 or +1, equally likely."""
        return (self.bits(shape) >> 63).to(torch.float32) * 2.0 + 1.0

    def normal(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) float32, standard normal (Box and Muller 1958).

        Rounded from float64, whose logarithm and cosine differ between devices by their last bits.
        """
        first, second = (_unsigned_shift(self.bits((*shape, 2)), 11).to(torch.float64) * 2.0**-53).unbind(-1)
        return ((-2.0 * (1.0 - first).log()).sqrt() * (2.0 * math.pi * second).cos()).to(torch.float32)


def image_generators(generator: torch.Generator | ImageGenerators | None, x: Tensor) -> ImageGenerators:
    """The given generators of images x (N, ...), or new ones from one draw of a generator (None: the global one).

    They draw on the device of x.
    UsageError for generators of another number of images.
    """
    if isinstance(generator, ImageGenerators):
        if len(generator) != len(x):
            raise UsageError(f"{len(generator)} random generators and {len(x)} images; give one per image")
        return generator.to(x.device)
    rows = torch.arange(len(x), device=x.device)
    return ImageGenerators.of(int(torch.randint(2**62, (), generator=generator)), rows)


def draw_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """The generator of one draw on ``device``: on the CPU the given one, elsewhere a new one of the device.

    Its seed is a draw of the given generator (None: the global one), which alone keeps a state: a saved run continues
    on any device. The draw costs neither a copy to the device nor a wait for it.
    """
    if device.type == "cpu":
        return generator
    return torch.Generator(device=device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection of 64-bit words."""
    z = (z ^ _unsigned_shift(z, 30)) * _FIRST
    z = (z ^ _unsigned_shift(z, 27)) * _SECOND
    return z ^ _unsigned_shift(z, 31)


def _unsigned_shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right, filled with zeros (the shift of int64 repeats the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _word(kind: str, label: int | str) -> int:
    """64 bits for a label; repr keeps integers and strings apart."""
    digest = hashlib.blake2b(f"{kind} {label!r}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))
