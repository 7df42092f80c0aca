"""A cached teacher's logits are those of the images in the data set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks.losses import kl
from robustq.data import Augment, TensorSplit
from robustq.hardening.methods import rslad as module
from robustq.hardening.methods.rslad import CachedTeacher

CPU = torch.device("cpu")
IMAGES = 11


class Network(nn.Module):
    """In train mode it uses the statistics of the batch, which a teacher must not."""

    def __init__(self, seed: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, 5)
        self.gain = gain
        self.shown = 0

    def forward(self, x: Tensor) -> Tensor:
        self.shown += len(x)
        logits: Tensor = self.gain * self.fc(self.norm(self.conv(x)).relu().flatten(1))
        return logits


def split() -> TensorSplit:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (IMAGES, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return TensorSplit(images, torch.arange(IMAGES) % 5)


def test_a_cached_teacher_gets_the_images_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    network = Network()
    teacher = CachedTeacher(network.train(), split(), mirrored=False, device=CPU)
    shown = network.shown
    assert shown == IMAGES
    plain = split().images.float() / 255
    fresh = Network().eval()(plain)
    # For any crop, in any order, the logits are those of the image. Bits may differ from a pass through
    # other batches (another kernel sums in another order): a few units in the last place of float32.
    for part in split().batches(4, device=CPU, seed=1, epoch=2, augment=Augment(2, True)):
        assert not torch.equal(part.x, plain[part.indices])
        torch.testing.assert_close(teacher.logits(part.x, part.indices), fresh[part.indices], rtol=1e-6, atol=1e-6)
    assert network.shown == shown
    assert teacher.passes == 0


def test_a_cached_teacher_of_flipped_images_gives_the_mean_of_both() -> None:
    teacher = CachedTeacher(Network(), split(), mirrored=True, device=CPU)
    plain = split().images.float() / 255
    network = Network().eval()
    expected = (network(plain).softmax(1) + network(plain.flip(3)).softmax(1)) / 2
    # float32, through a logarithm and back.
    torch.testing.assert_close(teacher.logits(plain, torch.arange(IMAGES)).softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_certain_gives_finite_divergences() -> None:
    # Probabilities of the other classes underflow to 0 in float32.
    teacher = CachedTeacher(Network(gain=1e4), split(), mirrored=True, device=CPU)
    soft = teacher.logits(torch.empty(0), torch.arange(IMAGES))
    assert soft.softmax(1).min() == 0.0
    assert kl(Network().eval()(split().images.float() / 255), soft).isfinite().all()
