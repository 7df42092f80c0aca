"""The real suites at a tenth of the price: every attack and every stage, with smaller budgets."""

from __future__ import annotations

from dataclasses import replace

from robustq.evaluation.suites import SUITES, Suite

BUDGETS = {"steps": 5, "queries": 30, "corners": 3, "target_classes": 2}


def small(name: str) -> Suite:
    suite = SUITES[name]
    attacks = []
    for attack in suite.attacks:
        less = {key: value for key, value in BUDGETS.items() if key in attack.settings}
        attacks.append(replace(attack, settings={**attack.settings, **less}))
    return replace(suite, attacks=tuple(attacks))
