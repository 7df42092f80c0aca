"""Accuracy: predictions, and confidence intervals of their shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from robustq.errors import UsageError
from robustq.memory import free_memory
from robustq.progress import bar

_Z = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion (Wilson 1927, JASA 22).

    With p = correct / total, n = total and z the normal quantile of 0.975:
    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    An expected number of successes, of images that are right with a probability, is allowed: the interval is then too
    wide rather than too narrow. Returns (low, high) as fractions; low is exactly 0 for no success, high exactly 1 for
    nothing but successes. UsageError for no images, or correct outside 0 .. total.
    """
    if total < 1:
        raise UsageError(f"an interval over {total} images does not exist; use at least 1")
    if not 0 <= correct <= total:
        raise UsageError(f"{correct} correct of {total} images is impossible; correct must be 0 to {total}")
    p = correct / total
    scale = 1.0 + _Z * _Z / total
    centre = (p + _Z * _Z / (2.0 * total)) / scale
    half_width = _Z * math.sqrt(p * (1.0 - p) / total + _Z * _Z / (4.0 * total * total)) / scale
    # At the ends rounding would leave 1e-18 instead of 0.
    low = 0.0 if correct == 0 else centre - half_width
    high = 1.0 if correct == total else centre + half_width
    return low, high


def constant_accuracy(labels: Tensor) -> float:
    """The accuracy of one class for every image, at best: the share of the most frequent label in int64 (N,)."""
    return int(labels.bincount().max()) / len(labels)


# no_grad and not inference_mode: Brevitas' layers fail on inference tensors.
@torch.no_grad()
def all_logits(model: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int) -> Tensor:
    """The logits of all images, (N, K) on the CPU; (0, 0) for no images. Put the model into eval mode first.

    x is (N, C, H, W) float32 in [0, 1], on the device of the model, which need not be PyTorch's. UsageError for a batch
    size below 1, or a model that does not answer with one row of logits per image. Where a GPU's memory is too small,
    batches are halved.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; give at least 1")
    parts = [torch.empty(0, 0)] if len(x) == 0 else []
    with bar("predict", len(x)) as progress:
        first = 0
        while first < len(x):
            batch = x[first : first + batch_size]
            logits = _within_memory(model, batch)
            if logits is None:
                batch_size = len(batch) // 2
                continue
            if logits.ndim != 2 or len(logits) != len(batch):
                raise UsageError(
                    f"the model answered {len(batch)} images with a tensor of shape {tuple(logits.shape)}; "
                    "logits must be (images, classes)"
                )
            parts.append(logits)
            first += len(batch)
            progress.advance(len(batch))
    return torch.cat(parts)


def _within_memory(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor | None:
    """The logits on the CPU; None where a GPU's memory is too small. For a single image torch's error is raised."""
    try:
        return model(batch).cpu()
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    free_memory()  # behind the handler, which keeps the tensors of the failed call alive
    return None


def top_classes(logits: Tensor) -> Tensor:
    """The class of the highest of the logits (N, K), the lowest of equal ones: (N,) int64; -1 where any logit is NaN.

    A model that answers NaN has not classified the image; argmax would give the index of the NaN.
    """
    if len(logits) == 0:
        return torch.empty(0, dtype=torch.int64)
    return logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -1)


def predict(model: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int) -> Tensor:
    """:func:`top_classes` of :func:`all_logits`: (N,) int64 on the CPU."""
    return top_classes(all_logits(model, x, batch_size=batch_size))


def correct(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, batch_size: int) -> Tensor:
    """Whether each image is classified as its label y (N,) int64: (N,) bool on the CPU; NaN logits count as wrong.

    Args, Raises: of :func:`all_logits`; also UsageError if the numbers of images and labels differ.
    """
    if len(x) != len(y):
        raise UsageError(f"{len(x)} images and {len(y)} labels; give one label per image")
    predictions = predict(model, x, batch_size=batch_size)
    return (predictions == y.cpu()) & (predictions >= 0)
