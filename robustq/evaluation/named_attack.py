"""An attack with its budget settled: a column of a table, a step of a suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from robustq.attacks.ascent import Model
from robustq.attacks.hunt import Criterion
from robustq.attacks.streams import Streams

Asks = Literal["judge", "source", "surrogates", "features"]


@dataclass(frozen=True)
class NamedAttack:
    """An attack as a suite runs it.

    Args:
        name: in results.
        attack: ``attack(model, x, y, *, epsilon, ...) -> x_adv`` of :mod:`robustq.attacks`.
        settings: its budget, by argument.
        stage: of the suite, as results group it.
        asks: whose answers guide it. ``judge``: no gradient is needed, so the judge's own; ``source``: the
            differentiable model under each backward rule; ``surrogates``: each other network, one after the other;
            ``features``: the source's inner layer.
        random: whether it takes ``generator``.
        hunts: whether it takes ``criterion``, by which images that broke leave it.
        after: the attack whose survivors it is run on, broken by others since or not, so that the two compare; None:
            on what still stands.
    """

    name: str
    attack: Callable[..., Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "white-box"
    asks: Asks = "source"
    random: bool = True
    hunts: bool = False
    after: str | None = None

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        epsilon: float,
        generator: torch.Generator | Streams,
        criterion: Criterion | None = None,
        **others: Any,
    ) -> Tensor:
        """(B, C, H, W) in [0, 1] -> adversarial images of the same shape, not rounded.

        Args:
            model: what it asks.
            x: (B, C, H, W) float32 in [0, 1].
            y: (B,) int64 labels.
            epsilon: radius.
            generator: randomness, where it takes any.
            criterion: what counts as broken, where it stops at that.
            others: ``features`` or ``surrogates``, where it asks them.
        """
        more: dict[str, Any] = {**self.settings, **others}
        if self.random:
            more["generator"] = generator
        if self.hunts:
            more["criterion"] = criterion
        return self.attack(model, x, y, epsilon=epsilon, **more)
