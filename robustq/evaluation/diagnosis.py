"""The checks for gradient masking: runs attacks, and counts what the flags are raised by (`evaluation.flags`).

Images that break here count against the model like under any other attack. The comparisons use the gradient of
training: the other backward rules are there to find what that gradient hides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustq.attacks import apgd, fgsm, pgd_plus_plus
from robustq.attacks.base import Model, input_gradient
from robustq.attacks.losses import cross_entropy, margin
from robustq.data.splits import evenly_spaced
from robustq.evaluation import flags
from robustq.evaluation.accuracy import Comparison, compare_kept
from robustq.evaluation.evaluator import DIAGNOSIS, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.result import AttackResult
from robustq.evaluation.suites import CROSS_ENTROPY, NOISE, NamedAttack, Suite
from robustq.evaluation.target import DRAWS, Target

IMAGES = 500
"""The number of images for the attacks of the diagnosis alone: one point is five of them."""

LARGE_BALL = 0.5
"""In it every image can become the same grey one."""


def _apgd(name: str, steps: int, **settings: object) -> NamedAttack:
    return NamedAttack(f"{name} {steps}", apgd, {"steps": steps, **settings}, stage=DIAGNOSIS)


FGSM = NamedAttack("fgsm", fgsm, stage=DIAGNOSIS)
PGD = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20, "loss": cross_entropy}, stage=DIAGNOSIS)
# The same attack on rescaled logits; the same name gives it the same random starts.
RESCALED = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20}, stage=DIAGNOSIS)
FIFTY, HUNDRED = _apgd("apgd-ce", 50), _apgd("apgd-ce", 100)
MARGIN = _apgd("apgd-margin", 50, loss=margin)
LARGE = (_apgd("apgd-ce", 20), _apgd("apgd-margin", 20, loss=margin))


def diagnose(target: Target, evaluator: Evaluator, *, suite: Suite, different: int, random: float) -> list[Check]:
    """Check for every kind of masking in the table of docs/flags.md.

    Args:
        target, evaluator, suite: after the attacks of the suite; the attacks of the diagnosis are added.
        different: number of clean images on which gradient model and judge disagree.
        random: share of images that two calls of the judge answered differently.

    Returns:
        one check per flag; no ``harness`` and ``noise`` without a control, no ``transfer`` without surrogates.
    """
    diagnosis = _Diagnosis(target, evaluator, suite)
    checks = [
        *diagnosis.harness_and_noise(),
        diagnosis.step_order(),
        diagnosis.large_ball(),
        diagnosis.zero_gradient(),
        diagnosis.logit_scale(),
        diagnosis.loss(),
        diagnosis.gradient_free(),
        *diagnosis.transfer(),
        flags.randomness(share=random, draws=DRAWS),
        flags.twin(different=different, images=len(evaluator.x), random=random > 0.0),
    ]
    return sorted(checks, key=lambda check: flags.FLAG_NAMES.index(check.name))


class _Diagnosis:
    """Runs PGD on those of up to 500 images (indices) that are right without attack; each method is a check."""

    def __init__(self, target: Target, evaluator: Evaluator, suite: Suite) -> None:
        self.target, self.evaluator, self.suite = target, evaluator, suite
        self.suite_results = list(evaluator.results)
        self.indices = evenly_spaced(len(evaluator.x), IMAGES)
        self.right = self.indices[evaluator.clean[self.indices]]
        self.pgd = evaluator.run(PGD, target.gradient_model, self.right)

    def harness_and_noise(self) -> list[Check]:
        control, epsilon, lost = self.target.control, self.evaluator.epsilon, None
        if control is None:
            return []
        while True:
            undefended = self._evaluator(control, epsilon=epsilon)
            clean = int(undefended.clean.sum())
            if lost is None:
                pgd = undefended.run(PGD, control, undefended.clean_indices)
                lost = Comparison(len(self.indices), len(pgd.broken_indices), 0)
            for attack in (FIFTY, MARGIN):
                undefended.run(attack, control, undefended.remaining_indices)
            kept = int(undefended.robust.sum())
            # In a ball that is small for the data (MNIST at 8/255) even a network without defence keeps images.
            if kept <= flags.HARNESS_KEPT * len(self.indices) or epsilon >= LARGE_BALL:
                break
            epsilon = min(2.0 * epsilon, LARGE_BALL)
        noise = self._suite_result(NOISE)
        kept_by_noise = noise.kept[torch.isin(noise.indices, self.right)]
        return [
            flags.harness(kept=kept, images=len(self.indices), epsilon=epsilon, clean=clean),
            flags.noise(compare_kept(kept_by_noise, self.pgd.kept, images=len(self.indices)), control=lost),
        ]

    def step_order(self) -> Check:
        def among_right(indices: Tensor) -> Tensor:
            return indices[torch.isin(indices, self.right)]

        one_step = self.evaluator.run(FGSM, self.target.gradient_model, self.right)
        fifty = next((result for result in self.suite_results if result.name == CROSS_ENTROPY), None)
        steps = next(attack.settings["steps"] for attack in self.suite.attacks if attack.name == CROSS_ENTROPY)
        if fifty is None or steps != FIFTY.settings["steps"]:
            fifty = self.evaluator.run(FIFTY, self.target.gradient_model, self.right)
        images = len(self.indices)
        hundred = self.evaluator.run(HUNDRED, self.target.gradient_model, among_right(fifty.kept_indices))
        others = among_right(fifty.broken_indices)
        more_steps = self._completed(hundred, HUNDRED, others, points=flags.MORE_STEPS_POINTS, images=images)
        return flags.step_order(compare_kept(self.pgd.kept, one_step.kept, images=images), more_steps)

    def large_ball(self) -> Check:
        images = len(self.indices)
        large = self._evaluator(self.evaluator.judge, epsilon=LARGE_BALL)
        for model in self.target.gradient_models.values():
            for attack in LARGE:
                large.run(attack, model, large.remaining_indices)
        return flags.large_ball(
            kept=int(large.robust.sum()),
            images=images,
            chance=float(large.y.bincount().max()) / images,
            against_small=compare_kept(large.robust, self.evaluator.robust[self.indices], images=images),
            epsilon=LARGE_BALL,
        )

    def zero_gradient(self) -> Check:
        zero, evaluator = 0, self.evaluator
        for indices in torch.split(self.right, evaluator.batch_size):
            rows = indices.to(evaluator.x.device)
            loss = partial(cross_entropy, y=evaluator.y[rows])
            gradient = input_gradient(self.target.gradient_model, evaluator.x[rows], loss).gradient
            zero += int((gradient == 0.0).flatten(1).all(dim=1).sum())
        return flags.zero_gradient(zero=zero, images=len(self.right))

    def logit_scale(self) -> Check:
        label = "pgd20 on rescaled logits"
        rescaled = self.evaluator.run(RESCALED, self.target.gradient_model, self.right, label=label)
        # Plain cross-entropy is both attacks that used it: a stronger attack must not count as a better scale.
        plain = self.pgd.kept & ~torch.isin(self.right, self._suite_result(CROSS_ENTROPY).broken_indices)
        images = len(self.indices)
        left = (int(plain.sum()) / images, len(rescaled.kept_indices) / images)
        return flags.logit_scale(compare_kept(plain, rescaled.kept, images=images), left=left)

    def loss(self) -> Check:
        reference, images = self._suite_result(CROSS_ENTROPY), len(self.evaluator.x)
        left, found = len(reference.kept_indices) / images, []
        for attack in self.suite.attacks:
            if attack.after == CROSS_ENTROPY and attack.attack is not pgd_plus_plus:
                result, others = self._suite_result(attack.name), reference.broken_indices
                against = self._completed(result, attack, others, points=flags.LOSS_POINTS, images=images)
                found.append((attack.name, against, (left, left - against.difference)))
        return flags.loss(found)

    def gradient_free(self) -> Check:
        """Attacks with gradients the images that queries alone had broken before."""
        evaluator = self.evaluator
        names = [attack.name for attack in self.suite.attacks if attack.uses == "queries"]
        by_queries = _union(result.broken_indices for result in self.suite_results if result.name in names)
        by_gradients = _union(result.broken_indices for result in self.suite_results if result.stage == "white-box")
        missed = by_queries[~torch.isin(by_queries, by_gradients)]
        for model in self.target.gradient_models.values():
            for attack in (FIFTY, MARGIN):
                missed = evaluator.run(attack, model, missed).kept_indices
        never_broken = ~torch.isin(evaluator.clean_indices, torch.cat([by_gradients, by_queries]))
        left = int(never_broken.sum()) + len(missed)
        return flags.gradient_free(broken=len(missed), left=left, images=len(evaluator.x))

    def transfer(self) -> list[Check]:
        found = []
        for name in self.target.surrogates:
            results = [one for one in self.suite_results if one.stage == "transfer" and one.name.endswith(f": {name}")]
            broken = sum(len(result.broken_indices) for result in results)
            found.append((name, Comparison(len(self.evaluator.x), broken, 0)))
        return [flags.transfer(found)] if found else []

    def _completed(
        self, second: AttackResult, attack: NamedAttack, others: Tensor, *, points: float, images: int
    ) -> Comparison:
        """Compare an attack with a second one that ran only on the images that the first had left.

        The second one runs on the others, which the first broke, only if their result matters.
        """
        found = Comparison(images, len(second.broken_indices), 0)
        if found.exceeds(points):
            label = f"{attack.name}, the others"
            rest = self.evaluator.run(attack, self.target.gradient_model, others, label=label, stage=DIAGNOSIS)
            found = replace(found, only_second=len(rest.kept_indices))
        return found

    def _evaluator(self, judge: Model, *, epsilon: float) -> Evaluator:
        """Another evaluator on the images of the diagnosis."""
        first = self.evaluator
        rows = self.indices.to(first.x.device)
        return Evaluator(
            judge, first.x[rows], first.y[rows], epsilon=epsilon, batch_size=first.batch_size, seed=first.seed
        )

    def _suite_result(self, name: str) -> AttackResult:
        return next(result for result in self.suite_results if result.name == name)


def _union(parts: Iterable[Tensor]) -> Tensor:
    union: Tensor = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *parts]))
    return union
