"""Attack suites: named sets of attacks with fixed budgets, so that one word in a report says what was run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from robustq import attacks
from robustq.attacks.losses import cross_entropy, margin, targeted_dlr
from robustq.errors import UsageError


@dataclass(frozen=True)
class NamedAttack:
    """An attack with its budget: a column of a table, or a step of a suite.

    Args:
        name, stage: in results, and of the suite, as results group it.
        attack: ``attack(model, x, y, *, epsilon, ...) -> x_adv`` of :mod:`robustq.attacks`.
        settings: its budget, by argument.
        uses: ``gradients``: a differentiable model, under each backward rule; ``queries``: answers of the judge or its
            proxy; ``surrogates``: each other network, one after the other; ``features``: the inner layer.
        after: name of the attack whose survivors it runs on, whether other attacks have broken them since or not, so
            that the two compare; None: on the images that are still robust.
    """

    name: str
    attack: Callable[..., Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "white-box"
    uses: Literal["gradients", "queries", "surrogates", "features"] = "gradients"
    after: str | None = None


PAPER_STEP = 4 / 255
"""Step of PGD, BIM and TPGD in the paper's tables, for every radius (arXiv:2210.08701, appendix)."""

_PAPER_STEPS = {"step_size": PAPER_STEP, "steps": 20}

PAPER: tuple[NamedAttack, ...] = (
    NamedAttack("gn", attacks.gaussian_noise),
    NamedAttack("fgsm", attacks.fgsm),
    NamedAttack("pgd20", attacks.pgd, _PAPER_STEPS),
    NamedAttack("bim20", attacks.bim, _PAPER_STEPS),
    NamedAttack("tpgd20", attacks.tpgd, _PAPER_STEPS),
)
"""The white-box columns of Tables I, II and V, with the paper's budgets; on surrogates they are the columns "(B)"."""

RECHECK: tuple[NamedAttack, ...] = (
    NamedAttack("fgsm", attacks.fgsm),
    NamedAttack("pgd20", attacks.pgd, {"steps": 20, "keep_best": True}),
    NamedAttack("margin_pgd40", attacks.pgd, {"steps": 40, "loss": margin, "keep_best": True}),
)
"""The re-check of a deployed file: two losses, random starts, steps of epsilon / 4, the worst iterate kept.

The last iterate of a sign attack with a fixed step overshoots, and leaves images that an earlier iterate broke.
"""

CROSS_ENTROPY = "apgd-ce"
"""The attack that other losses are compared with."""


@dataclass(frozen=True)
class Suite:
    """Attacks in their order, and how they are counted.

    Args:
        name, attacks: as ``--suite`` takes it, and from cheap to expensive.
        summary: a phrase for ``--help``.
        drops_broken: later attacks run on the images that are still robust; else each is a column over all images.
        checks_masking: the flags are checked, and a verdict is given.
        transfers: the white-box attacks run on the surrogates too, as columns of their own.
    """

    name: str
    attacks: tuple[NamedAttack, ...]
    summary: str = ""
    drops_broken: bool = True
    checks_masking: bool = True
    transfers: bool = False


FIXED_STEPS = "pgd-t"
"""The attack whose steps do not depend on the loss, for a loss that is flat."""

DIFFERENCES = ("apgd-margin", "apgd-t", FIXED_STEPS, "fab-t")
"""Attacks on differences of two logits, by name."""


def _white_box(*, steps: int) -> tuple[NamedAttack, ...]:
    """APGD with three losses, PGD++, and targeted PGD with fixed steps.

    Margin and targeted loss run on all that cross-entropy left, so that they compare with it.
    """
    targeted = {"steps": steps, "loss": targeted_dlr, "target_classes": 9}
    return (
        NamedAttack(CROSS_ENTROPY, attacks.apgd, {"steps": steps, "loss": cross_entropy}),
        NamedAttack("apgd-margin", attacks.apgd, {"steps": 50, "loss": margin}, after=CROSS_ENTROPY),
        NamedAttack("pgd++", attacks.pgd_plus_plus, {"steps": 20}),
        NamedAttack("apgd-t", attacks.apgd_targeted, targeted, after=CROSS_ENTROPY),
        NamedAttack(FIXED_STEPS, attacks.pgd_targeted, {"steps": 10, "target_classes": 9}),
    )


NOISE = "uniform noise"
"""The attack that gradient attacks must beat."""

_NOISE = (
    NamedAttack(NOISE, attacks.uniform_noise, stage="noise and corners", uses="queries"),
    NamedAttack("corners", attacks.random_corners, {"corners": 20}, stage="noise and corners", uses="queries"),
)
_INDIRECT = (
    NamedAttack("features", attacks.feature_space, {"steps": 50}, stage="features", uses="features"),
    NamedAttack("transfer", attacks.transfer, {"steps": 50}, stage="transfer", uses="surrogates"),
)


STANDARD: tuple[NamedAttack, ...] = (
    *_NOISE,
    *_white_box(steps=50),
    *_INDIRECT,
    NamedAttack("square", attacks.square, {"queries": 1000}, stage="square", uses="queries"),
)
"""The five stages: noise and corners; white-box; the aligned features; transfer; Square."""

RAYS = NamedAttack("rays", attacks.rays, {"queries": 1000}, stage="hard label", uses="queries")

FULL: tuple[NamedAttack, ...] = (
    *_NOISE,
    *_white_box(steps=100),
    NamedAttack("fab-t", attacks.fab_targeted, {"steps": 100, "target_classes": 9}),
    *_INDIRECT,
    NamedAttack("square", attacks.square, {"queries": 5000}, stage="square", uses="queries"),
    RAYS,
)
"""The same with AutoAttack's four attacks at its standard settings (arXiv:2003.01690), and RayS."""

SUITES: MappingProxyType[str, Suite] = MappingProxyType(
    {
        "standard": Suite("standard", STANDARD, summary="five stages and masking checks"),
        "full": Suite("full", FULL, summary="adds AutoAttack's attacks, 5,000 queries and RayS"),
        "paper": Suite(
            "paper",
            PAPER,
            summary="GN, FGSM, PGD-20, BIM-20, TPGD-20",
            drops_broken=False,
            checks_masking=False,
            transfers=True,
        ),
        "recheck": Suite(
            "recheck", RECHECK, summary="FGSM, PGD-20, margin-PGD-40", drops_broken=False, checks_masking=False
        ),
    }
)
"""Name -> suite (read-only)."""


def without_gradients(suite: Suite, *, reason: str) -> Suite:
    """The attacks of a suite that need no gradient of the model, and RayS; the flags need gradients.

    Raises:
        UsageError: the suite has no such attack; ``reason`` says why there are no gradients.
    """
    left = tuple(attack for attack in suite.attacks if attack.uses in ("queries", "surrogates"))
    if not left:
        raise UsageError(f"suite '{suite.name}' needs gradients ({reason}); take --suite standard or full")
    added = () if any(attack.name == RAYS.name for attack in left) else (RAYS,)
    return replace(suite, attacks=(*left, *added), checks_masking=False)
