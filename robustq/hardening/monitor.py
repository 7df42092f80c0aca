"""Monitoring of a run on held-out training images: accuracies, signs of gradient masking, collapse.

The best checkpoint is chosen by these accuracies; test images take no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.attacks import pgd
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.hardening.features import FeatureTap

BATCH = 64  # images per backward pass of an inspection: no more memory than a small training batch
COLLAPSED_EPOCHS = 2  # consecutive epochs that make a collapse
PGD_STEPS = 10


@dataclass(frozen=True)
class Inspection:
    """Means over the images; they show whether a network resists attacks or masks its gradients.

    Growing features and margins saturate the loss; gradients vanish, and attacks that follow them fail on a network
    that is not robust (arXiv:1802.00420; the flags ``zero gradient`` and ``logit scale`` of docs/flags.md).
    """

    feature_norm: float | None  # L2 norm of the average-pooled features in front of global pooling
    logit_margin: float  # logit of the label minus the highest other one; negative for a wrong answer
    input_gradient_norm: float  # L2 norm of the gradient of one image's cross-entropy by its pixels in [0, 1]
    zero_gradients: float  # share of images in [0, 1] whose gradient is exactly zero in every pixel


def inspect_network(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = BATCH) -> Inspection:
    """One forward and one backward pass over the images, ``batch_size`` at a time, without gradients of weights.

    Args:
        model: images -> logits (n, K), K > 1, in eval mode.
        x: (N, C, H, W) float32 in [0, 1] on the model's device, N at least 1.
        y: (N,) int64.
    """
    tap = FeatureTap.of_pooling(model)
    sums = dict.fromkeys(("feature_norm", "logit_margin", "input_gradient_norm", "zero_gradients"), 0.0)
    for images, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits, features = (model(images), None) if tap is None else tap(images)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), images)
        right = logits.detach().gather(1, labels[:, None])[:, 0]
        others = logits.detach().scatter(1, labels[:, None], float("-inf"))
        sums["logit_margin"] += (right - others.amax(dim=1)).sum().item()
        sums["input_gradient_norm"] += gradient.flatten(1).norm(dim=1).sum().item()
        # Not from the norm: its squares underflow for gradients below 1e-23.
        sums["zero_gradients"] += int((gradient.flatten(1) == 0).all(dim=1).sum())
        if features is not None:
            sums["feature_norm"] += features.detach().norm(dim=1).sum().item()
    means: dict[str, Any] = {name: total / len(x) for name, total in sums.items()}
    return Inspection(**{**means, "feature_norm": None if tap is None else means["feature_norm"]})


@dataclass(frozen=True)
class Collapse:
    """A collapse of robust accuracy."""

    epoch: int  # after which it was certain, counted from 1
    robust: float  # PGD-10 accuracy on the held-out images after it, in [0, 1]
    best_epoch: int
    best: float  # the highest accuracy before
    planned: int  # epochs of the recipe

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
    """The collapse of robust accuracy (catastrophic overfitting) that the last epoch makes certain, if any.

    Single-step training can lose all robustness against PGD within one epoch while the training loss looks fine, and
    hardly ever recovers (arXiv:2001.03994, section 5.3). A collapse is a robust accuracy that for
    :data:`COLLAPSED_EPOCHS` consecutive epochs

    - is below half of the best so far: slow overfitting or a high learning rate cost a few points, not half;
    - has a 95% Wilson interval below that of the best one: a few images cannot stop a run;

    while the best one is above ``chance`` beyond doubt: a constant answer is robust, and loses that when it learns.
    One bad epoch does not count: BatchNorm's running statistics may lag behind a large step.

    Args:
        robust: PGD-10 accuracy after each epoch so far, in [0, 1]; None if it is not measured.
        images: number of images of each accuracy.
        chance: share of the most frequent class among them, in [0, 1].
        planned: epochs of the recipe.
    """
    counted = [accuracy for accuracy in robust if accuracy is not None]
    if len(counted) != len(robust) or len(counted) <= COLLAPSED_EPOCHS:
        return None
    before, recent = counted[:-COLLAPSED_EPOCHS], counted[-COLLAPSED_EPOCHS:]
    best = max(before)
    lowest, _ = _interval(best, images)
    is_down = [accuracy < best / 2 and _interval(accuracy, images)[1] < lowest for accuracy in recent]
    if lowest <= chance or not all(is_down):
        return None
    best_epoch = len(before) - before[::-1].index(best)  # of equal ones the last, as for best.pt
    return Collapse(len(counted), recent[-1], best_epoch, best, planned)


def _interval(accuracy: float, images: int) -> tuple[float, float]:
    return wilson_interval(round(accuracy * images), images)


@dataclass(frozen=True)
class HoldoutAccuracy:
    """Accuracies in [0, 1] on the held-out images; ``robust`` is None if only clean accuracy is measured."""

    clean: float
    robust: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Order of checkpoints: robust accuracy if it is measured, clean accuracy on ties."""
        return (self.clean if self.robust is None else self.robust, self.clean)


@dataclass(frozen=True, eq=False)
class Monitor:
    """Evaluates a network on the same images, from the same random start, after each epoch."""

    x: Tensor  # (N, C, H, W) float32 in [0, 1] on the model's device
    y: Tensor  # (N,) int64
    _: KW_ONLY
    epsilon: float | None  # radius; None: clean accuracy only
    batch_size: int  # images per pass
    seed: int  # of the random start of PGD-10

    @property
    def images(self) -> int:
        """The number of held-out images."""
        return len(self.x)

    @property
    def chance(self) -> float:
        """Accuracy in [0, 1] of the best constant answer."""
        return int(self.y.bincount().max()) / len(self.y)

    def evaluate(self, model: nn.Module) -> HoldoutAccuracy:
        """Accuracies of ``model`` in eval mode; its mode is restored."""
        with _eval_mode(model):
            clean = correct(model, self.x, self.y, batch_size=self.batch_size)
            robust = None if self.epsilon is None else self._robust(model, clean, self.epsilon)
        return HoldoutAccuracy(clean.float().mean().item(), robust)

    def inspect(self, model: nn.Module, *, batch_size: int) -> Inspection:
        """:func:`inspect_network` on the same images in eval mode; the mode is restored."""
        with _eval_mode(model):
            return inspect_network(model, self.x, self.y, batch_size=batch_size)

    def rehearse(self, model: nn.Module, *, images: int | None = None) -> float:
        """Do one batch of the work of :meth:`evaluate` and :meth:`inspect`, to measure time and memory.

        ``images`` is its size; None: that of :meth:`evaluate`. Returns the whole work as a multiple of it.
        """
        count = min(images or self.batch_size, self.batch_size, len(self.x))
        x, y = self.x[:count], self.y[:count]
        with _eval_mode(model):
            inspect_network(model, x, y)
            if self.epsilon is None:
                correct(model, x, y, batch_size=count)
                return len(self.x) / count
            pgd(model, x, y, epsilon=self.epsilon, step_size=self.epsilon, steps=1, generator=torch.Generator())
            # The inspection and PGD did one forward and one backward pass each.
            return (PGD_STEPS + 1) / 2 * len(self.x) / count

    def _robust(self, model: nn.Module, clean: Tensor, epsilon: float) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        robust = 0
        right = clean.nonzero().flatten().to(self.x.device)  # misclassified images need no attack
        for indices in torch.split(right, self.batch_size) if len(right) else ():
            x, y = self.x[indices], self.y[indices]
            x_adv = pgd(model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=PGD_STEPS, generator=generator)
            robust += int(correct(model, x_adv, y, batch_size=self.batch_size).sum())
        return robust / len(self.x)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
