"""Watches clean and robust accuracy on held-out training images, so that the best checkpoint can be kept.

Single-step training can collapse (catastrophic overfitting, arXiv:2001.03994): robust accuracy against PGD falls to
zero within an epoch while the training loss looks fine (:mod:`robustq.hardening.collapse`). The test images take no
part in this choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustq.attacks import pgd
from robustq.evaluation.accuracy import correct
from robustq.hardening.inspection import Inspection, inspect_network

PGD_STEPS = 10


@dataclass(frozen=True)
class Watched:
    """Accuracies in [0, 1]; ``robust`` is None where only clean accuracy is watched."""

    clean: float
    robust: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """What makes a checkpoint the best: robust accuracy where it is watched, clean accuracy on ties."""
        return (self.clean if self.robust is None else self.robust, self.clean)


class Monitor:
    """Counts on the same images, from the same random start, each epoch.

    Args:
        x: (N, C, H, W) float32 in [0, 1] on the model's device.
        y: (N,) int64.
        epsilon: radius; None to watch clean accuracy only.
        batch_size: images a pass.
        seed: of the random start of PGD-10.
    """

    def __init__(self, x: Tensor, y: Tensor, *, epsilon: float | None, batch_size: int, seed: int) -> None:
        self._x, self._y = x, y
        self._epsilon = epsilon
        self._batch_size = batch_size
        self._seed = seed

    @property
    def images(self) -> int:
        """How many held-out images are counted."""
        return len(self._x)

    @property
    def chance(self) -> float:
        """Accuracy in [0, 1] of the constant answer that is right most often."""
        return int(self._y.bincount().max()) / len(self._y)

    def watch(self, model: nn.Module) -> Watched:
        """Accuracies of ``model`` in eval mode; its mode is put back."""
        with _evaluating(model):
            clean = correct(model, self._x, self._y, batch_size=self._batch_size)
            robust = None if self._epsilon is None else self._robust(model, clean, self._epsilon)
        return Watched(clean.float().mean().item(), robust)

    def inspect(self, model: nn.Module, *, batch_size: int) -> Inspection:
        """Look inside ``model`` in eval mode, on the same images as they are; its mode is put back."""
        with _evaluating(model):
            return inspect_network(model, self._x, self._y, batch_size=batch_size)

    def rehearse(self, model: nn.Module, *, images: int | None = None) -> float:
        """Do on one batch what :meth:`watch` and :meth:`inspect` repeat, to see what it takes; the mode of ``model`` is
        put back.

        Args:
            model: as in :meth:`watch`.
            images: size of the batch; None for the one that :meth:`watch` uses.

        Returns:
            How many times as long the two take.
        """
        count = min(images or self._batch_size, self._batch_size, len(self._x))
        x, y = self._x[:count], self._y[:count]
        with _evaluating(model):
            inspect_network(model, x, y)
            if self._epsilon is None:
                correct(model, x, y, batch_size=count)
                return len(self._x) / count
            pgd(model, x, y, epsilon=self._epsilon, step_size=self._epsilon, steps=1, generator=torch.Generator())
            # Each did one forward and one backward pass.
            return (PGD_STEPS + 1) / 2 * len(self._x) / count

    def _robust(self, model: nn.Module, clean: Tensor, epsilon: float) -> float:
        generator = torch.Generator().manual_seed(self._seed)
        kept = 0
        places = clean.nonzero().flatten().to(self._x.device)  # an image that is wrong already needs no attack
        if len(places) == 0:
            return 0.0
        for part in torch.split(places, self._batch_size):
            x, y = self._x[part], self._y[part]
            x_adv = pgd(model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=PGD_STEPS, generator=generator)
            kept += int(correct(model, x_adv, y, batch_size=self._batch_size).sum())
        return kept / len(self._x)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
