"""The checks for gradient masking: runs attacks, and counts what the flags are raised by (`evaluation.flags`).

Images that break here count against the model like under any other attack. The comparisons use the gradient of
training: the other backward rules are there to find what that gradient hides.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustq.attacks import apgd, fgsm, pgd_plus_plus, pgd_targeted
from robustq.attacks.base import Model, input_gradient
from robustq.attacks.losses import cross_entropy, margin
from robustq.data.splits import evenly_spaced
from robustq.evaluation import flags
from robustq.evaluation.comparison import Comparison, compare_kept
from robustq.evaluation.evaluator import DIAGNOSIS, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.flatness import find_flat
from robustq.evaluation.result import AttackResult
from robustq.evaluation.suites import CROSS_ENTROPY, DIFFERENCES, FIXED_STEPS, NOISE, RAYS, NamedAttack, Suite
from robustq.evaluation.target import DRAWS, Target

IMAGES = 500
"""The number of images for the attacks of the diagnosis alone: one point is five of them."""

LARGE_BALL = 0.5
"""In it every image can become the same grey one."""


LONGER, LONGEST, STILL_FOUND = 4, 16, 0.01
"""Longer runs go on until they find nothing, up to four times the steps of the suite; up to sixteen times if the last
one broke over a point of the images."""


def _apgd(name: str, steps: int, **settings: object) -> NamedAttack:
    return NamedAttack(f"{name} {steps}", apgd, {"steps": steps, **settings}, stage=DIAGNOSIS)


FGSM = NamedAttack("fgsm", fgsm, stage=DIAGNOSIS)
PGD = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20, "loss": cross_entropy}, stage=DIAGNOSIS)
# The same attack on rescaled logits; the same name gives it the same random starts.
RESCALED = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20}, stage=DIAGNOSIS)
FIFTY = _apgd("apgd-ce", 50)
MARGIN = _apgd("apgd-margin", 50, loss=margin)
# On a loss that is flat or without gradient.
MORE_FIXED = NamedAttack("pgd-t 50", pgd_targeted, {"steps": 50, "target_classes": 9}, stage=DIAGNOSIS)
DECISIONS = replace(RAYS, stage=DIAGNOSIS)
LARGE = (_apgd("apgd-ce", 20), _apgd("apgd-margin", 20, loss=margin))


def diagnose(target: Target, evaluator: Evaluator, *, suite: Suite, different: int, random: float) -> list[Check]:
    """Check for every kind of masking in the table of docs/flags.md, after the attacks of the suite.

    ``different`` is the number of clean images on which gradient model and judge disagree, ``random`` the share of
    images that two calls of the judge answered differently. Returns one check per flag; no ``harness`` and ``noise``
    without a control, no ``transfer`` without surrogates, no ``file alone`` without a second gradient model.
    """
    diagnosis = _Diagnosis(target, evaluator, suite)
    checks = [
        *diagnosis.harness_and_noise(),
        diagnosis.step_order(),
        diagnosis.large_ball(),
        diagnosis.zero,
        diagnosis.flat_loss(),
        diagnosis.logit_scale(),
        diagnosis.loss(),
        diagnosis.gradient_free(),
        *diagnosis.transfer(),
        flags.randomness(share=random, draws=DRAWS),
        flags.twin(different=different, images=len(evaluator.x), random=random > 0.0),
        *diagnosis.file_alone(),
    ]
    return sorted(checks, key=lambda check: flags.FLAG_NAMES.index(check.name))


class _Diagnosis:
    """Runs PGD on those of up to 500 images (indices) that are right without attack; each method is a check."""

    def __init__(self, target: Target, evaluator: Evaluator, suite: Suite) -> None:
        self.target, self.evaluator, self.suite = target, evaluator, suite
        self.suite_results = list(evaluator.results)
        self.indices = evenly_spaced(len(evaluator.x), IMAGES)
        self.images = len(self.indices)
        self.right = self.indices[evaluator.clean[self.indices]]
        self.pgd = evaluator.run(PGD, target.gradient_model, self.right)
        self.zero = self._zero_gradient()

    def harness_and_noise(self) -> list[Check]:
        control, epsilon, images = self.target.control, self.evaluator.epsilon, self.images
        if control is None:
            return []
        undefended = self._evaluator(control, epsilon=epsilon)
        pgd = undefended.run(PGD, control, undefended.clean_indices)
        while True:
            for attack in (FIFTY, MARGIN):
                undefended.run(attack, control, undefended.remaining_indices)
            kept = int(undefended.robust.sum())
            # In a ball that is small for the data (MNIST at 8/255) even a network without defence keeps images.
            if kept <= flags.HARNESS_KEPT * images or epsilon >= LARGE_BALL:
                break
            epsilon = min(2.0 * epsilon, LARGE_BALL)
            undefended = self._evaluator(control, epsilon=epsilon)
        noise = self._suite_result(NOISE)
        against_noise = compare_kept(noise.kept[torch.isin(noise.indices, self.right)], self.pgd.kept, images=images)
        return [
            flags.harness(kept=kept, images=images, epsilon=epsilon, clean=int(undefended.clean.sum())),
            flags.noise(against_noise, control=Comparison(images, len(pgd.broken_indices), 0)),
        ]

    def step_order(self) -> Check:
        """Attack the remaining images with cross-entropy and more and more steps, until nothing more is found."""
        evaluator, model, images = self.evaluator, self.target.gradient_model, self.images
        one_step = evaluator.run(FGSM, model, self.right)
        shorter = self._suite_result(CROSS_ENTROPY)
        steps = [next(attack.settings["steps"] for attack in self.suite.attacks if attack.name == CROSS_ENTROPY)]
        by_entropy, found = shorter.broken_indices, len(evaluator.x)
        while found > (0 if steps[-1] < LONGER * steps[0] else STILL_FOUND * len(evaluator.x)):
            if steps[-1] == LONGEST * steps[0]:
                break
            remaining = evaluator.remaining_indices
            # The first run compares with the suite's, and needs images that broke there.
            indices = remaining if len(steps) > 1 else torch.unique(torch.cat([self.right, remaining]))
            steps.append(2 * steps[-1])
            longer = evaluator.run(_apgd(CROSS_ENTROPY, steps[-1]), model, indices)
            by_entropy = torch.cat([by_entropy, longer.broken_indices])
            found = int(torch.isin(longer.broken_indices, remaining).sum())
            if len(steps) == 2:
                both = shorter.indices[torch.isin(shorter.indices, self.right)]
                kept = (torch.isin(both, result.kept_indices) for result in (longer, shorter))
                fewer_steps = compare_kept(*kept, images=images)
        # Of the images that white-box attacks got: queries had broken the others before.
        by_suite = (torch.isin(shorter.indices, broken) for broken in (self._broken("white-box"), by_entropy))
        return flags.step_order(
            compare_kept(self.pgd.kept, one_step.kept, images=images),
            fewer_steps,
            only_longer=compare_kept(*(~broken for broken in by_suite), images=len(evaluator.x)),
            steps=steps,
        )

    def large_ball(self) -> Check:
        images = self.images
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

    def _zero_gradient(self) -> Check:
        zero, evaluator = 0, self.evaluator
        for indices in torch.split(self.right, evaluator.batch_size):
            rows = indices.to(evaluator.x.device)
            loss = partial(cross_entropy, y=evaluator.y[rows])
            gradient = input_gradient(self.target.gradient_model, evaluator.x[rows], loss).gradient
            zero += int((gradient == 0.0).flatten(1).all(dim=1).sum())
        return flags.zero_gradient(zero=zero, images=len(self.right))

    def flat_loss(self) -> Check:
        """Also attacks the remaining images by decisions alone, and with more fixed steps, if the loss is flat."""
        evaluator = self.evaluator
        only_fixed = len(self._broken(FIXED_STEPS))
        found = find_flat(self.target, evaluator.x, evaluator.y, self.right, epsilon=evaluator.epsilon)
        check = flags.flat_loss(
            flat=found.flat,
            images=found.images,
            of=found.of,
            fixed_steps=Comparison(len(evaluator.x), only_fixed, 0),
        )
        if check.raised or self.zero.raised:
            for model in self.target.gradient_models.values():
                evaluator.run(MORE_FIXED, model, evaluator.remaining_indices)
            evaluator.run(DECISIONS, self.target.query_model, evaluator.remaining_indices)
        return check

    def logit_scale(self) -> Check:
        label = "pgd20 on rescaled logits"
        rescaled = self.evaluator.run(RESCALED, self.target.gradient_model, self.right, label=label)
        # Plain cross-entropy is both attacks that used it: a stronger attack must not count as a better scale.
        plain = self.pgd.kept & ~torch.isin(self.right, self._suite_result(CROSS_ENTROPY).broken_indices)
        # Differences of two logits have a gradient at every scale.
        others = plain & ~torch.isin(self.right, self._broken(*DIFFERENCES))
        images = self.images
        left = (int(plain.sum()) / images, len(rescaled.kept_indices) / images)
        return flags.logit_scale(
            compare_kept(plain, rescaled.kept, images=images),
            others_against_rescaled=compare_kept(others, rescaled.kept, images=images),
            left=left,
        )

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
        by_queries = self._broken(*(attack.name for attack in self.suite.attacks if attack.uses == "queries"))
        by_gradients = self._broken("white-box")
        missed = by_queries[~torch.isin(by_queries, by_gradients)]
        for model in self.target.gradient_models.values():
            for attack in (FIFTY, MARGIN):
                missed = evaluator.run(attack, model, missed).kept_indices
        never_broken = ~torch.isin(evaluator.clean_indices, torch.cat([by_gradients, by_queries]))
        left = int(never_broken.sum()) + len(missed)
        return flags.gradient_free(broken=len(missed), left=left, images=len(evaluator.x))

    def transfer(self) -> list[Check]:
        found, by_transfer = [], [result for result in self.suite_results if result.stage == "transfer"]
        for name in self.target.surrogates:
            broken = sum(len(result.broken_indices) for result in by_transfer if result.name.endswith(f": {name}"))
            found.append((name, Comparison(len(self.evaluator.x), broken, 0)))
        return [flags.transfer(found)] if found else []

    def file_alone(self) -> list[Check]:
        """The same PGD through the file alone; its images count like those of any other attack."""
        if self.target.file_alone is None:
            return []
        found = self.evaluator.run(PGD, self.target.file_alone, self.right, label="pgd20 (file alone)")
        left = (len(self.pgd.kept_indices) / self.images, len(found.kept_indices) / self.images)
        return [flags.file_alone(compare_kept(self.pgd.kept, found.kept, images=self.images), left=left)]

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
        first, rows = self.evaluator, self.indices.to(self.evaluator.x.device)
        settings = {"batch_size": first.batch_size, "seed": first.seed}
        return Evaluator(judge, first.x[rows], first.y[rows], epsilon=epsilon, **settings)

    def _broken(self, *names: str) -> Tensor:
        """Indices of the images that attacks of the suite broke, by their names or their stage."""
        results = [one for one in self.suite_results if {one.name.split(" (")[0], one.stage} & set(names)]
        broken = [torch.empty(0, dtype=torch.int64), *(result.broken_indices for result in results)]
        return torch.as_tensor(torch.unique(torch.cat(broken)))

    def _suite_result(self, name: str) -> AttackResult:
        return next(result for result in self.suite_results if result.name == name)
