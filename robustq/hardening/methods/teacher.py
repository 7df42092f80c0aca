"""A robust network that another one learns from: its answers to training images, cached or asked for batch by batch."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor, nn

from robustq.data import Split
from robustq.progress import bar

BATCH = 500
"""Images that the teacher is shown at a time when its answers are cached; the same in every run, for the same bits."""


class Teacher(Protocol):
    """Gives soft labels."""

    @property
    def passes(self) -> int:
        """Forward passes of the teacher that a batch costs."""

    @property
    def digest(self) -> Tensor:
        """(32,) uint8, on the CPU: names the teacher's weights and how it is asked, for a run that is resumed."""

    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """Its answer to augmented training images (B, C, H, W) at ``places`` (B,): (B, K), without gradient."""


class AskedTeacher:
    """Looks at the very images that the student is trained on: one forward pass of the teacher a batch.

    Args:
        network: on the device of the batches; put into eval mode.
    """

    passes = 1

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()
        self.digest = _digest(network, "asked")

    @torch.no_grad()
    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """See :meth:`Teacher.logits`."""
        answer: Tensor = self._network(x)
        return answer


class CachedTeacher:
    """Has looked once at each training image as it is in the data set, and answers so for every crop of it.

    Where training augments, this deviates from arXiv:2108.07969, whose teacher sees the crop. Answers that are exact
    for every crop would not be worth keeping: a CIFAR image has 162 crops and mirrorings, more than a run has epochs,
    so that few would be used twice. The deviation is not small (docs/methods.md has figures), hence no default. Where
    training mirrors images, the soft label is the mean of the probabilities of the image and its mirror image, so that
    it does not depend on which of the two the student sees.

    The answers are a pure function of teacher, data and device, so a resumed run computes them again. Memory: 4 bytes
    for each class of each training image (CIFAR-10: 1.8 MB, ImageNet: 5.1 GB), on the device.

    Args:
        network: on ``device``; put into eval mode.
        split: the training images.
        mirrored: whether training mirrors them.
        device: where the network and the batches are.
    """

    passes = 0

    def __init__(self, network: nn.Module, split: Split, *, mirrored: bool, device: torch.device) -> None:
        self.digest = _digest(network, f"cached, mirrored {mirrored}")
        network.eval()
        parts = []
        with torch.no_grad(), bar("teacher", len(split)) as progress:
            # Without a seed the images come in their own order and are not augmented.
            for batch in split.batches(BATCH, device=device):
                logits: Tensor = network(batch.x)
                if mirrored:
                    mirror: Tensor = network(batch.x.flip(-1))
                    # In logarithms: a probability that rounds to 0 would make the divergence NaN.
                    logits = torch.logaddexp(logits.log_softmax(dim=1), mirror.log_softmax(dim=1)) - math.log(2)
                parts.append(logits)
                progress.advance(len(batch.y))
        self._answers = torch.cat(parts)

    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """See :meth:`Teacher.logits`; log-probabilities where images are mirrored."""
        return self._answers[places]


def _digest(network: nn.Module, how: str) -> Tensor:
    seen = hashlib.sha256(how.encode())
    for name, value in sorted(network.state_dict().items()):
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(seen.digest()), dtype=torch.uint8)
