"""Random numbers per image: published values, statistics, and that an image's numbers depend on nothing but its key."""

from __future__ import annotations

import math

import torch

from robustq.attacks.generators import ImageGenerators


def test_numbers_are_those_of_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0 and with 1234567 (the values that ports of it are checked with).
    published = [
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        [6457827717110365317, 3203168211198807973, 9817491932198370423],
    ]
    numbers = ImageGenerators(torch.tensor([0, 1234567])).bits((3,))
    assert [[value % 2**64 for value in row] for row in numbers.tolist()] == published


def test_numbers_depend_on_seed_image_attack_and_label_only() -> None:
    generators = ImageGenerators.of(0, range(10), attack="square")
    again = ImageGenerators.of(0, torch.tensor([7, 3]), attack="square")
    assert torch.equal(again.uniform((4, 5)), generators.uniform((4, 5))[[7, 3]])
    assert torch.equal(generators[torch.tensor([7, 3])].keys, again.keys)
    assert torch.equal(generators[2:4].keys, generators.keys[2:4])
    mask = torch.arange(10) % 3 == 0
    assert torch.equal(generators[mask].child("a", 1).keys, generators.child("a").child(1).keys[mask])
    keys = [
        generators.keys,
        ImageGenerators.of(1, range(10), attack="square").keys,
        ImageGenerators.of(0, range(10), attack="rays").keys,
        ImageGenerators.of(0, range(10, 20), attack="square").keys,
        generators.child(1).keys,
        generators.child("1").keys,
        generators.child(1, 1).keys,
        generators.child().child(2).keys,
    ]
    assert len(set(torch.cat(keys).tolist())) == 80


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    uniform = ImageGenerators.of(5, range(50)).uniform((40, 50))
    assert uniform.shape == (50, 40, 50)
    assert uniform.dtype == torch.float32
    assert 0.0 <= float(uniform.min()) < 1e-4 and 1 - 1e-4 < float(uniform.max()) < 1.0
    # 100,000 draws: the counts of 16 bins have a standard deviation of 77 around 6,250; five of them.
    counts = torch.histc(uniform, bins=16, min=0, max=1)
    assert float((counts - 6250).abs().max()) <= 5 * 77
    # Neighbours, images and children are uncorrelated: five standard errors of 1 / sqrt(n).
    other = ImageGenerators.of(5, range(50)).child(0).uniform((40, 50))
    for a, b in ((uniform[:, :, 1:], uniform[:, :, :-1]), (uniform[1:], uniform[:-1]), (uniform, other)):
        pair = torch.stack([a.flatten(), b.flatten()]).double()
        assert abs(float(torch.corrcoef(pair)[0, 1])) <= 5 / math.sqrt(a.numel())


def test_signs_and_normals() -> None:
    generators = ImageGenerators.of(6, range(100))
    signs = generators.signs((1000,))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) <= 5 / math.sqrt(100_000)
    normal = generators.normal((1000,)).double()
    assert abs(float(normal.mean())) <= 5 / math.sqrt(100_000)
    assert abs(float(normal.var()) - 1.0) <= 5 * math.sqrt(2 / 100_000)
    # The share beyond two sigma, 4.55%, with five standard errors.
    assert abs(float((normal.abs() > 2).double().mean()) - 0.0455) <= 5 * math.sqrt(0.0455 / 100_000)
    assert not normal.isinf().any()
