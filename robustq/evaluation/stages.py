"""The stages of a suite: which attack runs on which images, through which model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from robustq.attacks.base import Model
from robustq.evaluation import flags
from robustq.evaluation.comparison import compare_kept
from robustq.evaluation.evaluator import DIAGNOSIS, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.result import AttackResult
from robustq.evaluation.suites import NamedAttack, Suite
from robustq.evaluation.target import AS_TRAINED, Target


def run_stages(evaluator: Evaluator, target: Target, suite: Suite) -> None:
    """Run the attacks of a suite; the results are in the evaluator."""
    everything = torch.arange(len(evaluator.x))
    white_box = _WhiteBox(evaluator, target)
    for attack in suite.attacks:
        if attack.uses == "surrogates":
            for name, surrogate in target.surrogates.items():
                label = f"{attack.name}: {name}"
                remaining = evaluator.remaining_indices
                evaluator.run(attack, target.query_model, remaining, label=label, surrogate=surrogate)
        elif attack.uses == "features" and target.features is not None:
            evaluator.run(attack, target.gradient_model, evaluator.remaining_indices, features=target.features)
        elif attack.uses == "queries":
            evaluator.run(attack, target.query_model, evaluator.remaining_indices)
        elif attack.uses == "gradients" and suite.drops_broken:
            white_box.run(attack)
        elif attack.uses == "gradients" and target.gradient_models:
            # A column of a table uses one gradient, that of training.
            evaluator.run(attack, target.gradient_model, everything)
    if suite.transfers:
        for name, surrogate in target.surrogates.items():
            for attack in suite.attacks:
                evaluator.run(attack, surrogate, everything, label=f"{attack.name} (B: {name})", stage="transfer")


FIRST_TARGETS = 1
"""Target classes with which a backward rule other than that of training must break an image before it gets all."""


class _WhiteBox:
    """Runs attacks under each backward rule; later rules get the images that earlier ones left.

    The rule of training comes first, since the flags compare its attacks; the others in the order of the images that
    they broke so far. One that breaks none in an attack is not used again.
    """

    def __init__(self, evaluator: Evaluator, target: Target) -> None:
        self.evaluator, self.models = evaluator, dict(target.gradient_models)
        self.broken = dict.fromkeys(self.models, 0)
        self.reference: AttackResult | None = None

    def run(self, attack: NamedAttack) -> None:
        """Run an attack; the first one is the reference of those that name an attack to run after."""
        rules = sorted(self.models, key=lambda rule: -self.broken[rule])
        for rule in sorted(rules, key=lambda rule: rule != AS_TRAINED):
            if rule == AS_TRAINED:
                indices = self.evaluator.remaining_indices
                if attack.after is not None and self.reference is not None:
                    indices = self.reference.kept_indices
                result = self.evaluator.run(attack, self.models[rule], indices)
                self.reference = self.reference or result
            elif not self._run_under(rule, attack):
                del self.models[rule]

    def _run_under(self, rule: str, attack: NamedAttack) -> int:
        """The number of images that an attack breaks under a rule."""
        parts = [attack]
        if attack.settings.get("target_classes", 0) > FIRST_TARGETS:
            parts.insert(0, replace(attack, settings={**attack.settings, "target_classes": FIRST_TARGETS}))
        broken = 0
        for part in parts:
            label = f"{attack.name} ({rule})"
            result = self.evaluator.run(part, self.models[rule], self.evaluator.remaining_indices, label=label)
            broken += len(result.broken_indices)
            if not broken:
                break
        self.broken[rule] += broken
        return broken


def through_file_alone(evaluator: Evaluator, model: Model, suite: Suite) -> Check:
    """The columns of a suite once more, with another gradient model for the same judge; they are a count of their own.

    The count through model.pt stays comparable with that of the export.
    """
    first = evaluator.clean.clone()
    for result in evaluator.results:
        if result.stage == "white-box":
            first[result.broken_indices] = False
    settings: dict[str, Any] = {name: getattr(evaluator, name) for name in ("epsilon", "batch_size", "seed")}
    second = Evaluator(evaluator.judge, evaluator.x, evaluator.y, **settings)
    for attack in suite.attacks:
        if attack.uses == "gradients":
            label = f"{attack.name} (file alone)"
            second.run(attack, model, torch.arange(len(second.x)), label=label, stage=DIAGNOSIS)
    evaluator.results += second.results
    images = len(second.x)
    left = (int(first.sum()) / images, int(second.robust.sum()) / images)
    return flags.file_alone(compare_kept(first, second.robust, images=images), left=left)
