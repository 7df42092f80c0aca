"""Attack suites.

An attack with its budget settled: a column of a table, a step of a suite.

Named sets of attacks. A suite fixes every attack's budget, so that one word in a report says what was run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from robustq.attacks import (
    apgd,
    apgd_targeted,
    bim,
    fab_targeted,
    feature_space,
    fgsm,
    gaussian_noise,
    pgd,
    pgd_plus_plus,
    random_corners,
    rays,
    square,
    tpgd,
    transfer,
    uniform_noise,
)
from robustq.attacks.base import Criterion, Model
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import cross_entropy, margin, targeted_dlr

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
        generator: torch.Generator | ImageGenerators,
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


PAPER_STEP = 4 / 255
"""Step of PGD, BIM and TPGD in the paper's tables, whatever the radius (arXiv:2210.08701, appendix)."""

_PAPER_STEPS = {"step_size": PAPER_STEP, "steps": 20}

PAPER: tuple[NamedAttack, ...] = (
    NamedAttack("gn", gaussian_noise),
    NamedAttack("fgsm", fgsm, random=False),
    NamedAttack("pgd20", pgd, _PAPER_STEPS),
    NamedAttack("bim20", bim, _PAPER_STEPS, random=False),
    NamedAttack("tpgd20", tpgd, _PAPER_STEPS),
)
"""The white-box columns of Tables I, II and V, with the paper's budgets; on surrogates they are the columns "(B)"."""

RECHECK: tuple[NamedAttack, ...] = (
    NamedAttack("fgsm", fgsm, random=False),
    NamedAttack("pgd20", pgd, {"steps": 20, "keep_best": True}),
    NamedAttack("margin_pgd40", pgd, {"steps": 40, "loss": margin, "keep_best": True}),
)
"""What a deployed file is re-checked with: two losses, random starts, steps of epsilon / 4, the worst iterate kept.

The last iterate of a sign attack with a fixed step overshoots, and leaves images that an earlier iterate broke.
"""

CROSS_ENTROPY = "apgd-ce"
"""The attack that other losses are compared with."""


@dataclass(frozen=True)
class Suite:
    """Attacks in their order, and how they are counted.

    Args:
        name: as ``--suite`` takes it.
        attacks: cheap to dear.
        drops_broken: later attacks meet only what the ones before left; else each is a column of its own, over all
            images.
        hunts_masking: the flags are looked for, and a verdict is given.
        transfers: the white-box attacks are run on the surrogates too, as columns of their own.
    """

    name: str
    attacks: tuple[NamedAttack, ...]
    drops_broken: bool = True
    hunts_masking: bool = True
    transfers: bool = False


def _white_box(*, steps: int) -> tuple[NamedAttack, ...]:
    """APGD with three losses and PGD++; the last three on all that cross-entropy left, so that they compare with it."""
    targeted = {"steps": steps, "loss": targeted_dlr, "target_classes": 9}
    return (
        NamedAttack(CROSS_ENTROPY, apgd, {"steps": steps, "loss": cross_entropy}, hunts=True),
        NamedAttack("apgd-margin", apgd, {"steps": 50, "loss": margin}, hunts=True, after=CROSS_ENTROPY),
        NamedAttack("apgd-t", apgd_targeted, targeted, hunts=True, after=CROSS_ENTROPY),
        NamedAttack("pgd++", pgd_plus_plus, {"steps": 20}, hunts=True, after=CROSS_ENTROPY),
    )


NOISE = "uniform noise"
"""The attack that a gradient must beat."""

_NOISE = (
    NamedAttack(NOISE, uniform_noise, stage="noise and corners", asks="judge"),
    NamedAttack("corners", random_corners, {"corners": 20}, stage="noise and corners", asks="judge", hunts=True),
)
_INDIRECT = (
    NamedAttack("features", feature_space, {"steps": 50}, stage="features", asks="features", hunts=True),
    NamedAttack("transfer", transfer, {"steps": 50}, stage="transfer", asks="surrogates", hunts=True),
)


def _square(queries: int) -> NamedAttack:
    return NamedAttack("square", square, {"queries": queries}, stage="square", asks="judge", hunts=True)


STANDARD: tuple[NamedAttack, ...] = (*_NOISE, *_white_box(steps=50), *_INDIRECT, _square(1000))
"""The five stages: noise and corners; white-box; the aligned features; transfer; Square."""

FULL: tuple[NamedAttack, ...] = (
    *_NOISE,
    *_white_box(steps=100),
    NamedAttack("fab-t", fab_targeted, {"steps": 100, "target_classes": 9}, hunts=True),
    *_INDIRECT,
    _square(5000),
    NamedAttack("rays", rays, {"queries": 1000}, stage="hard label", asks="judge", random=False, hunts=True),
)
"""The same with AutoAttack's four attacks at its standard settings (arXiv:2003.01690), 5,000 queries, and RayS, which
sees the classes alone.
"""

SUITES: MappingProxyType[str, Suite] = MappingProxyType(
    {
        "paper": Suite("paper", PAPER, drops_broken=False, hunts_masking=False, transfers=True),
        "recheck": Suite("recheck", RECHECK, drops_broken=False, hunts_masking=False),
        "standard": Suite("standard", STANDARD),
        "full": Suite("full", FULL),
    }
)
"""Name -> suite (read-only)."""
