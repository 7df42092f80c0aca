"""Named sets of attacks. A suite fixes every attack's budget, so that one word in a report says what was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustq.attacks import bim, fgsm, gaussian_noise, pgd, tpgd
from robustq.attacks.ascent import Model
from robustq.attacks.losses import margin


class Attack(Protocol):
    """An attack with its budget settled."""

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, epsilon: float, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) in [0, 1] -> adversarial images of the same shape."""


@dataclass(frozen=True)
class NamedAttack:
    """An attack as a column of a table."""

    name: str
    run: Attack


PAPER_STEP = 4 / 255
"""Step of PGD, BIM and TPGD in the paper's tables, whatever the radius (arXiv:2210.08701, appendix)."""

PAPER: tuple[NamedAttack, ...] = (
    NamedAttack("gn", lambda model, x, y, *, epsilon, generator: gaussian_noise(
        model, x, y, epsilon=epsilon, generator=generator)),
    NamedAttack("fgsm", lambda model, x, y, *, epsilon, generator: fgsm(model, x, y, epsilon=epsilon)),
    NamedAttack("pgd20", lambda model, x, y, *, epsilon, generator: pgd(
        model, x, y, epsilon=epsilon, step_size=PAPER_STEP, steps=20, generator=generator)),
    NamedAttack("bim20", lambda model, x, y, *, epsilon, generator: bim(
        model, x, y, epsilon=epsilon, step_size=PAPER_STEP, steps=20)),
    NamedAttack("tpgd20", lambda model, x, y, *, epsilon, generator: tpgd(
        model, x, y, epsilon=epsilon, step_size=PAPER_STEP, steps=20, generator=generator)),
)  # fmt: skip
"""The white-box columns of Tables I, II and V, with the paper's budgets."""

RECHECK: tuple[NamedAttack, ...] = (
    NamedAttack("fgsm", lambda model, x, y, *, epsilon, generator: fgsm(model, x, y, epsilon=epsilon)),
    NamedAttack("pgd20", lambda model, x, y, *, epsilon, generator: pgd(
        model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=20, keep_best=True, generator=generator)),
    NamedAttack("margin_pgd40", lambda model, x, y, *, epsilon, generator: pgd(
        model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=40, loss=margin,
        keep_best=True, generator=generator)),
)  # fmt: skip
"""What a deployed file is re-checked with: two losses, random starts, steps of epsilon / 4, the worst iterate kept.

The last iterate of a sign attack with a fixed step overshoots, and leaves images that an earlier iterate broke.
"""

SUITES: dict[str, tuple[NamedAttack, ...]] = {"paper": PAPER, "recheck": RECHECK}
