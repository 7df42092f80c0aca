"""Watching a run: accuracy on held-out images, signs of masking, collapse.

What a network looks like from inside, on images that it has not been trained on: does it resist, or only mask?

Robust accuracy says how much is left; these four say how. Features that grow without bound and margins that grow with
them saturate the loss, so that gradients vanish and attacks that follow them fail on a network that is not robust
(arXiv:1802.00420; the flags ``zero gradient`` and ``logit scale`` of docs/flags.md are raised on the finished model).

Catastrophic overfitting noticed: robust accuracy that falls and stays down while the training loss looks fine.

Single-step training can lose all robustness against PGD within one epoch (arXiv:2001.03994, section 5.3), and hardly
ever finds it again; more epochs then only cost time. A drop counts as a collapse when the accuracy

- is below half of the best so far: training that overfits slowly, or an epoch at a high learning rate, loses points,
  not half; and
- the best was more than any constant answer reaches, beyond chance: a network in its first epochs may give one class to
  all images, which no attack changes, and looks less robust as soon as it learns; and
- lies below it beyond chance: the upper end of its 95% Wilson interval is under the lower end of the best one's, so
  that a few held-out images cannot stop a run; and
- does so in :data:`EPOCHS` epochs running: a single bad one, from which training recovers by itself, shows up wherever
  BatchNorm's running statistics lag behind a large step.

Watches clean and robust accuracy on held-out training images, so that the best checkpoint can be kept.

Single-step training can collapse (catastrophic overfitting, arXiv:2001.03994): robust accuracy against PGD falls to
zero within an epoch while the training loss looks fine (:mod:`robustq.hardening.monitor`). The test images take no
part in this choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.attacks import pgd
from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.hardening.features import FeatureTap

BATCH = 64
"""Images at a time: each needs a backward pass, and a run whose monitor only counts must not need more memory for it
than a small batch of training does."""


@dataclass(frozen=True)
class Inspection:
    """Means over the images.

    Args:
        feature_norm: L2 norm of the features that enter global pooling, average-pooled; None for a network whose global
            pooling is not known.
        logit_margin: logit of the label minus the highest other one; negative where the answer is wrong.
        input_gradient_norm: L2 norm of the gradient of one image's cross-entropy with respect to its pixels in [0, 1].
        zero_gradients: share of images in [0, 1] whose gradient is exactly zero in every pixel.
    """

    feature_norm: float | None
    logit_margin: float
    input_gradient_norm: float
    zero_gradients: float


def inspect_network(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = BATCH) -> Inspection:
    """One forward and one backward pass over the images; no gradient of a weight is computed or touched.

    Args:
        model: images -> logits (n, K) of K > 1 classes, in eval mode: the gradient of an image must not depend on those
            beside it.
        x: (N, C, H, W) float32 in [0, 1] on the model's device, N at least 1.
        y: (N,) int64.
        batch_size: images a pass; decides nothing but the memory.
    """
    tap = _tap(model)
    sums = dict.fromkeys(("feature_norm", "logit_margin", "input_gradient_norm", "zero_gradients"), 0.0)
    for images, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits, features = (model(images), None) if tap is None else tap(images)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), images)
        right = logits.detach().gather(1, labels[:, None])[:, 0]
        others = logits.detach().scatter(1, labels[:, None], float("-inf"))
        norms = gradient.flatten(1).norm(dim=1)
        sums["logit_margin"] += (right - others.amax(dim=1)).sum().item()
        sums["input_gradient_norm"] += norms.sum().item()
        # Of the entries and not of the norm, whose squares underflow for gradients below 1e-23.
        sums["zero_gradients"] += int((gradient.flatten(1) == 0).all(dim=1).sum())
        if features is not None:
            sums["feature_norm"] += features.detach().norm(dim=1).sum().item()
    means = {name: total / len(x) for name, total in sums.items()}
    return Inspection(
        None if tap is None else means["feature_norm"],
        means["logit_margin"],
        means["input_gradient_norm"],
        means["zero_gradients"],
    )


def _tap(model: nn.Module) -> FeatureTap | None:
    try:
        return FeatureTap(model, "pooled")
    except UsageError:
        return None


EPOCHS = 2
"""Epochs in a row that have to be down."""


@dataclass(frozen=True)
class Collapse:
    """A collapse of robust accuracy.

    Args:
        epoch: the epoch after which it was certain, counted from 1.
        robust: PGD-10 accuracy on the held-out images after it, in [0, 1].
        best_epoch, best: of the highest one before.
        planned: epochs of the recipe.
    """

    epoch: int
    robust: float
    best_epoch: int
    best: float
    planned: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """One line: what happened, where the good weights are, what to do."""
        return (
            f"robust accuracy collapsed (catastrophic overfitting): PGD-10 {self.robust:.1%} on held-out images in "
            f"epoch {self.epoch}, {self.best:.1%} in epoch {self.best_epoch}; stopped after {self.epoch} of "
            f"{self.planned} epochs, best.pt is of epoch {self.best_epoch}; lower lr or epsilon, take another method, "
            "or train on regardless in a new run with --set stop_on_collapse=false"
        )


def find_collapse(robust: Sequence[float | None], *, images: int, chance: float, planned: int) -> Collapse | None:
    """Whether the last epoch of ``robust`` makes a collapse certain.

    Args:
        robust: PGD-10 accuracy after each epoch so far, in [0, 1]; None where it is not watched.
        images: that it was counted on.
        chance: share of the most frequent class among them, in [0, 1].
        planned: epochs of the recipe.
    """
    counted = [accuracy for accuracy in robust if accuracy is not None]
    if len(counted) != len(robust) or len(counted) <= EPOCHS:
        return None
    before, recent = counted[:-EPOCHS], counted[-EPOCHS:]
    best = max(before)
    if _interval(best, images)[0] <= chance or not all(_is_down(accuracy, best, images) for accuracy in recent):
        return None
    best_epoch = len(before) - before[::-1].index(best)  # of equal ones the last, as best.pt's
    return Collapse(len(counted), recent[-1], best_epoch, best, planned)


def _is_down(accuracy: float, best: float, images: int) -> bool:
    return accuracy < best / 2 and _interval(accuracy, images)[1] < _interval(best, images)[0]


def _interval(accuracy: float, images: int) -> tuple[float, float]:
    return wilson_interval(round(accuracy * images), images)


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
