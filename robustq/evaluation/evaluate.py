"""Counts accuracy under attack: one model finds the images, the judge answers for them.

The judge is the thing whose robustness is claimed (for a deployed file: onnxruntime); the source is a differentiable
model near it, often the same. Every adversarial image is rounded to a uint8 picture inside the ball before it is
counted, since a device can receive nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustq.attacks.ascent import Model
from robustq.attacks.ball import round_to_uint8
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct, predict, wilson_interval
from robustq.evaluation.suites import NamedAttack
from robustq.progress import bar

Judge = Callable[[Tensor], Tensor]

NOT_JUDGED = "not judged"
"""The verdict of a suite that does not hunt for gradient masking."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over ``images`` images; every accuracy is a fraction.

    Args:
        images: how many were used.
        epsilon: radius of the ball.
        clean: (N,) bool, right without attack.
        attacked: attack name -> (N,) bool, right under that attack.
        twin_agreement: share of clean images that source and judge put into the same class.
        seconds: wall time.
    """

    images: int
    epsilon: float
    clean: Tensor
    attacked: dict[str, Tensor]
    twin_agreement: float
    seconds: float
    flags: tuple[str, ...] = field(default=())
    verdict: str = NOT_JUDGED

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right without attack and under every attack (the worst case per image)."""
        worst = self.clean.clone()
        for kept in self.attacked.values():
            worst &= kept
        return worst

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are right without attack."""
        return _share(self.clean)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that no attack of the suite broke: an upper bound of the true robust accuracy."""
        return _share(self.robust)

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``robustq attack --json``."""
        return {
            "images": self.images,
            "epsilon": self.epsilon,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(wilson_interval(int(self.clean.sum()), self.images)),
            "robust_accuracy": self.robust_accuracy,
            "interval": list(wilson_interval(int(self.robust.sum()), self.images)),
            "attacks": {name: _share(kept) for name, kept in self.attacked.items()},
            "twin_agreement": self.twin_agreement,
            "flags": list(self.flags),
            "verdict": self.verdict,
            "seconds": self.seconds,
        }


def evaluate(
    judge: Judge,
    source: Model,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[NamedAttack],
    epsilon: float,
    device: torch.device,
    batch_size: int = 256,
    seed: int = 0,
) -> Evaluation:
    """Attack ``source``, count on ``judge``.

    Args:
        judge: float32 (B, C, H, W) on ``device`` -> logits (B, K).
        source: the same, differentiable; in eval mode.
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        attacks: which, in order.
        epsilon: radius in [0, 1].
        device: where the source lives.
        batch_size: images an attack works on at once.
        seed: of all random starts; with the attack's place and the batch's it gives each batch its own stream.

    Raises:
        UsageError: no images, or a radius above 0 and below one grey level.
    """
    if len(images) == 0:
        raise UsageError("no images to evaluate on; give --images of at least 1")
    if 0.0 < epsilon < 1 / 255 - 1e-9:
        raise UsageError(
            f"epsilon {epsilon:g} is below one grey level, so that no uint8 picture differs; give 0, or 1/255 and up"
        )
    start = time.perf_counter()
    x, y = to_float(images.to(device)), labels.to(device)
    predicted = predict(judge, x, batch_size=batch_size)
    agreement = (predicted == predict(source, x, batch_size=batch_size)).float().mean().item()
    attacked: dict[str, Tensor] = {}
    with bar("attack", len(attacks) * len(x)) as progress:
        for place, attack in enumerate(attacks):
            parts = []
            for number, (x_part, y_part) in enumerate(
                zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
            ):
                generator = torch.Generator().manual_seed((seed * 1009 + place) * 100_003 + number)
                x_adv = attack.run(source, x_part, y_part, epsilon=epsilon, generator=generator)
                x_adv = round_to_uint8(x_adv, x_part, epsilon=epsilon)
                parts.append(correct(judge, x_adv, y_part, batch_size=batch_size))
                progress.advance(len(y_part), attack.name)
            attacked[attack.name] = torch.cat(parts)
    return Evaluation(
        images=len(x),
        epsilon=epsilon,
        clean=(predicted == labels) & (predicted >= 0),
        attacked=attacked,
        twin_agreement=agreement,
        seconds=time.perf_counter() - start,
    )


def _share(kept: Tensor) -> float:
    return int(kept.sum()) / len(kept)
