"""What an evaluation is handed: the judge whose answers count, and the models whose gradients find the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustq.attacks.base import Model
from robustq.attacks.feature_space import Features
from robustq.evaluation.accuracy import answers

AS_TRAINED = "as trained"
"""The backward rule that training used: the first of a target's sources, and the only one of a float model."""

DRAWS = 8
"""Answers that stand for one where a model answers at random: their mean is what is judged, and what is attacked
(expectation over transformation, Athalye et al. 2018, arXiv:1707.07397)."""

_PROBES = 32
_ROUNDING = 1e-3
"""Share of the logit range that one kernel's rounding never reaches and another scale of activations always does."""

_MANY = 0.25


@dataclass(frozen=True)
class Target:
    """One interface for a PyTorch model under test and for a file in onnxruntime.

    Every model takes float32 (B, C, H, W) in [0, 1] and answers with logits (B, K).

    Args:
        judge: the thing whose robustness is claimed. Its gradient is never asked for.
        sources: name of the backward rule -> a differentiable model with the judge's forward; the first is the one
            that training used. For a PyTorch model the judge itself.
        features: the source's logits (B, K) and the layer that training aligned, of one pass and with gradient; None:
            there is no such layer.
        surrogates: name -> another network for the same task, whose images may transfer.
        control: a naturally trained network on the same data, which has no defence; None: nobody gave one.
        image_by_image: the judge's answer to an image depends on the images beside it (dynamic quantization), so that
            it is asked about one at a time.
        guide: a faster form of the judge, which attacks without gradient ask in its place; what breaks an image is the
            judge's word all the same. None: the judge itself.
    """

    judge: Model
    sources: Mapping[str, Model]
    features: Features | None = None
    surrogates: Mapping[str, Model] = field(default_factory=dict)
    control: Model | None = None
    image_by_image: bool = False
    guide: Model | None = None

    @classmethod
    def of(cls, model: Model) -> Target:
        """A differentiable model that is its own judge."""
        return cls(model, {AS_TRAINED: model})

    @property
    def source(self) -> Model:
        """The differentiable model as training used it."""
        return next(iter(self.sources.values()))

    @property
    def asked(self) -> Model:
        """What attacks without gradient ask."""
        return self.judge if self.guide is None else self.guide


def one_by_one(model: Model) -> Model:
    """``model``, asked about a single image at a time."""

    def asked(x: Tensor) -> Tensor:
        return torch.cat([model(x[place : place + 1]) for place in range(len(x))]) if len(x) else model(x)

    return asked


def averaged(model: Model, *, draws: int = DRAWS) -> Model:
    """The mean of ``draws`` answers, with the mean of their gradients."""

    def mean(x: Tensor) -> Tensor:
        return torch.stack([model(x) for _ in range(draws)]).mean(dim=0)

    return mean


def answers_at_random(judge: Model, x: Tensor, *, batch_size: int) -> float:
    """Share of up to 32 images to which two calls give different logits, beyond a thousandth of their range.

    Args:
        judge: images -> logits.
        x: (N, C, H, W) float32 in [0, 1].
        batch_size: images per call.
    """
    few = x[:_PROBES]
    return _share_apart(answers(judge, few, batch_size=batch_size), answers(judge, few, batch_size=batch_size))


def depends_on_batch(judge: Model, x: Tensor) -> bool:
    """Whether images get other logits alone than beside up to 31 others, beyond a thousandth of their range.

    Kernels may sum in another order for one image, and in a quantized network move a value that sits on a rounding tie:
    that touches an image now and then, another scale of the activations nearly all.
    """
    few = x[:_PROBES]
    apart = _share_apart(answers(judge, few, batch_size=len(few) or 1), answers(judge, few, batch_size=1))
    return apart > _MANY


def settled(target: Target, x: Tensor, *, batch_size: int) -> tuple[Target, float]:
    """The target as it is to be judged: one image at a time where answers depend on the batch, and in the mean of
    several answers where they are random.

    Args:
        target: as it was handed in.
        x: (N, C, H, W) some of the clean images.
        batch_size: images per call.

    Returns:
        the target, and the share of images that two calls answered differently.
    """
    if target.image_by_image:
        target = _rejudged(target, one_by_one)
    random = answers_at_random(target.judge, x, batch_size=batch_size)
    if random > 0.0:
        sources = {name: averaged(model) for name, model in target.sources.items()}
        return replace(_rejudged(target, averaged), sources=sources), random
    if not target.image_by_image and depends_on_batch(target.judge, x):
        return replace(_rejudged(target, one_by_one), image_by_image=True), random
    return target, random


def _rejudged(target: Target, asked: Callable[[Model], Model]) -> Target:
    """The target whose judge is asked in another way; a guide is a form of the judge as it was."""
    return replace(target, judge=asked(target.judge), guide=None)


def _share_apart(first: Tensor, second: Tensor) -> float:
    if len(first) == 0:
        return 0.0
    first, second = first.nan_to_num(), second.nan_to_num()
    spread = float(first.max() - first.min())
    # Equal infinities leave NaN as their difference, which is not apart.
    apart = (first - second).abs().amax(dim=1) > _ROUNDING * spread
    return float(apart.float().mean())
