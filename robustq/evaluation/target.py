"""The input of an evaluation: the judge whose answers count, and the models that find adversarial images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustq.attacks.base import Model
from robustq.attacks.feature_space import Features
from robustq.evaluation.accuracy import all_logits, correct, top_classes

AS_TRAINED = "as trained"
"""The backward rule of training: that of a target's first gradient model, and the only one of a float model."""

DRAWS = 8
"""A model that answers at random is judged and attacked in the mean of so many answers (expectation over
transformation, Athalye et al. 2018, arXiv:1707.07397)."""

SINGLE_DRAWS = 32
"""Answers to an image that estimate how often a single one is right."""

CALLS, ASKED = 44, 4
"""Calls with the same few images that look for randomness: one that shows in a tenth of the calls is missed in 1% of
the searches, 0.9^44."""

_PROBES = 32  # clean images that are answered together and alone
# Share of an image's gap between its two highest logits that no answer to the same batch may move, and another batch
# only of few images: kernels round differently, another scale of activations shows in all.
_OF_GAP, _MANY = 1e-3, 0.25
_ULPS = {"same batch": 8, "other batch": 256}  # rounding of the logits themselves, in units of float32


@dataclass(frozen=True)
class Target:
    """The model under attack, in PyTorch or as a file in onnxruntime, with the models that attacks use.

    Every model takes float32 (B, C, H, W) in [0, 1] and answers with logits (B, K).

    Args:
        judge: the model whose robustness is claimed. It is never differentiated.
        gradient_models: name of the backward rule -> a differentiable model with the judge's forward; the rule of
            training first. For a PyTorch model the judge itself. Empty where nothing gives gradients.
        features: logits (B, K) and the layer that training aligned, of one pass and with gradient, or None.
        surrogates: name -> another network for the same task, whose adversarial images may transfer.
        control: a naturally trained network without defence on the same data, or None.
        image_by_image: the judge gets one image at a time, as its answer depends on the batch (dynamic quantization).
        proxy: another form of the judge, faster or with more than the class, or None: for queries of attacks without
            gradient; it decides over no image.
        one_answer: the judge itself where ``judge`` is the mean of its random answers, or None.
        file_alone: the twin of a file whose gradient models are of its model.pt, or None: both are compared.
    """

    judge: Model
    gradient_models: Mapping[str, Model]
    features: Features | None = None
    surrogates: Mapping[str, Model] = field(default_factory=dict)
    control: Model | None = None
    image_by_image: bool = False
    proxy: Model | None = None
    one_answer: Model | None = None
    file_alone: Model | None = None

    @classmethod
    def of(cls, model: Model) -> Target:
        """A differentiable model that is its own judge."""
        return cls(model, {AS_TRAINED: model})

    @property
    def gradient_model(self) -> Model:
        """The differentiable model with the backward rule of training."""
        return next(iter(self.gradient_models.values()))

    @property
    def query_model(self) -> Model:
        """The model for attacks without gradient: the proxy, or else the judge."""
        return self.judge if self.proxy is None else self.proxy


def one_by_one(model: Model) -> Model:
    """``model``, called with one image at a time."""

    def logits(x: Tensor) -> Tensor:
        return torch.cat([model(x[index : index + 1]) for index in range(len(x))]) if len(x) else model(x)

    return logits


def averaged(model: Model) -> Model:
    """The mean of ``DRAWS`` answers, with the mean of their gradients."""

    def mean(x: Tensor) -> Tensor:
        return torch.stack([model(x) for _ in range(DRAWS)]).mean(dim=0)

    return mean


def share_right(judge: Model, x: Tensor, y: Tensor, *, batch_size: int) -> Tensor:
    """The share of ``SINGLE_DRAWS`` answers of a random judge that are right, for each image: (N,) float64."""
    right = [correct(judge, x, y, batch_size=batch_size) for _ in range(SINGLE_DRAWS)]
    return torch.stack(right).double().mean(dim=0)


def adapt_target(target: Target, x: Tensor, *, batch_size: int) -> tuple[Target, float]:
    """Judge image by image where answers depend on the batch, and in the mean of several answers where they are random.

    x: (N, C, H, W), clean images; 32 of them are used, four for repeated calls. Returns the target, and the share of
    those images that calls with the same batch answered differently.
    """
    # Without the proxy, which answers as the judge did before, wherever the judge is wrapped.
    x = x[:_PROBES]
    if target.image_by_image:
        target = replace(target, judge=one_by_one(target.judge), proxy=None)
    random = _share_random(target.judge, x, batch_size=batch_size)
    if random > 0.0:
        models = {name: averaged(model) for name, model in target.gradient_models.items()}
        mean = averaged(target.judge)
        target = replace(target, judge=mean, one_answer=target.judge, proxy=None, gradient_models=models)
    elif not target.image_by_image:
        together, alone = (all_logits(target.judge, x, batch_size=size) for size in (len(x) or 1, 1))
        if float(_apart(together, alone, ulps=_ULPS["other batch"]).float().mean()) > _MANY:
            target = replace(target, judge=one_by_one(target.judge), proxy=None, image_by_image=True)
    return target, random


def _share_random(judge: Model, x: Tensor, *, batch_size: int) -> float:
    """Share of the images that two calls with the same batch answered differently: all once more, and four often."""
    first, again = (all_logits(judge, x, batch_size=batch_size) for _ in range(2))
    random = _apart(first, again, ulps=_ULPS["same batch"])
    few = x[:ASKED]
    known = all_logits(judge, few, batch_size=ASKED)
    for _ in range(CALLS - 1):
        answer = all_logits(judge, few, batch_size=ASKED)
        random[:ASKED] |= _apart(known, answer, ulps=_ULPS["same batch"])
    return float(random.float().mean())


def _apart(first: Tensor, second: Tensor, *, ulps: int) -> Tensor:
    """Images with another class, or a logit that moved: (N, K) twice -> (N,) bool.

    By more than a thousandth of the image's own gap between its two highest logits: a logit of -1e6 says nothing of the
    others. Each logit may move by its own rounding.
    """
    if first.shape[1] == 0:
        return torch.zeros(len(first), dtype=torch.bool)
    classes = top_classes(first) != top_classes(second)
    first, second = first.double().nan_to_num(nan=0.0), second.double().nan_to_num(nan=0.0)
    highest = first.topk(min(2, first.shape[1]), dim=1).values
    gap = highest[:, :1] - highest[:, -1:]
    rounding = ulps * torch.finfo(torch.float32).eps * torch.maximum(first.abs(), second.abs())
    # The difference of equal infinities is NaN, which does not compare as apart.
    return classes | ((first - second).abs() > torch.maximum(_OF_GAP * gap, rounding)).any(dim=1)
