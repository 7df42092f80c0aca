"""The hunt for gradient masking: makes the counts that the flags are raised by (:mod:`robustq.evaluation.flags`).

What breaks an image here counts against the model like any other attack. The comparisons use the gradient that training
used, since the other backward rules are there to find what that one hides.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from robustq.attacks import apgd, fgsm, pgd_plus_plus
from robustq.attacks.base import input_gradient
from robustq.attacks.losses import cross_entropy, margin
from robustq.data.splits import evenly_spaced
from robustq.evaluation import flags
from robustq.evaluation.accuracy import Comparison, compare_kept
from robustq.evaluation.evaluator import DIAGNOSIS, AttackResult, Evaluator
from robustq.evaluation.flags import Check
from robustq.evaluation.suites import CROSS_ENTROPY, NOISE, NamedAttack, Suite
from robustq.evaluation.target import DRAWS, Target

IMAGES = 500
"""How many images the attacks of the diagnosis alone are run on: one point is five of them."""

LARGE_BALL = 0.5
"""Every image can become the same grey one in it."""


def _extra(name: str, steps: int, **settings: object) -> NamedAttack:
    return NamedAttack(f"{name} {steps}", apgd, {"steps": steps, **settings}, stage=DIAGNOSIS, hunts=True)


FGSM = NamedAttack("fgsm", fgsm, stage=DIAGNOSIS, random=False)
PGD = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20, "loss": cross_entropy}, stage=DIAGNOSIS, hunts=True)
# The same attack but for the logits; the same name gives it the same random starts.
RESCALED = NamedAttack("pgd20", pgd_plus_plus, {"steps": 20}, stage=DIAGNOSIS, hunts=True)
FIFTY, HUNDRED = _extra("apgd-ce", 50), _extra("apgd-ce", 100)
MARGIN = _extra("apgd-margin", 50, loss=margin)
LARGE = (_extra("apgd-ce", 20), _extra("apgd-margin", 20, loss=margin))


def diagnose(target: Target, campaign: Evaluator, *, suite: Suite, different: int, random: float) -> list[Check]:
    """Look for every kind of masking that the table of docs/flags.md names.

    Args:
        target: as it was attacked.
        campaign: after the suite's stages; the attacks of the diagnosis are added to it.
        suite: that was run.
        different: clean images on which source and judge disagree.
        random: share of images that two calls of the judge answered differently.

    Returns:
        one check a flag; without a control neither ``harness`` nor ``noise``, without surrogates no ``transfer``.
    """
    return _Diagnosis(target, campaign, suite).checks(different=different, random=random)


class _Diagnosis:
    def __init__(self, target: Target, campaign: Evaluator, suite: Suite) -> None:
        self.target, self.campaign, self.suite = target, campaign, suite
        self.stages = list(campaign.trials)
        self.places = evenly_spaced(len(campaign.x), IMAGES)
        """Places of the images that are looked at; those of ``few`` are right without attack."""
        self.few = self.places[campaign.clean[self.places]]

    def checks(self, *, different: int, random: float) -> list[Check]:
        pgd = self.campaign.run(PGD, self.target.source, self.few)
        found = [
            *self._against_control(pgd),
            self._step_order(pgd),
            self._large_ball(),
            self._zero_gradient(),
            self._logit_scale(pgd),
            self._loss(),
            self._gradient_free(),
            *self._transfer(),
            flags.randomness(share=random, draws=DRAWS),
            flags.twin(different=different, images=len(self.campaign.x), random=random > 0.0),
        ]
        return sorted(found, key=lambda check: flags.FLAG_NAMES.index(check.name))

    def _against_control(self, pgd: AttackResult) -> list[Check]:
        """The flags harness and noise."""
        control, campaign = self.target.control, self.campaign
        if control is None:
            return []
        rows = self.places.to(campaign.x.device)
        epsilon, taken = campaign.epsilon, None
        while True:
            undefended = Evaluator(
                control,
                campaign.x[rows],
                campaign.y[rows],
                epsilon=epsilon,
                batch_size=campaign.batch_size,
                seed=campaign.seed,
            )
            clean = int(undefended.clean.sum())
            if taken is None:
                lost = undefended.run(PGD, control, undefended.clean_indices)
                taken = Comparison(len(rows), len(lost.broken_indices), 0)
            for attack in (FIFTY, MARGIN):
                undefended.run(attack, control, undefended.remaining_indices)
            kept = int(undefended.standing.sum())
            # Where the ball is small for the data (MNIST at 8/255), even a network without defence stands.
            if kept <= flags.HARNESS_KEPT * len(rows) or epsilon >= LARGE_BALL:
                break
            epsilon = min(2.0 * epsilon, LARGE_BALL)
        noise = self._trial(NOISE)
        alike = noise.kept[torch.isin(noise.places, self.few)]
        return [
            flags.harness(kept=kept, images=len(rows), epsilon=epsilon, clean=clean),
            flags.noise(compare_kept(alike, pgd.kept, images=len(rows)), control=taken),
        ]

    def _step_order(self, pgd: AttackResult) -> Check:
        one = self.campaign.run(FGSM, self.target.source, self.few)
        reference = next((trial for trial in self.stages if trial.name == CROSS_ENTROPY), None)
        steps = next(attack.settings["steps"] for attack in self.suite.attacks if attack.name == CROSS_ENTROPY)
        if reference is None or steps != FIFTY.settings["steps"]:
            reference = self.campaign.run(FIFTY, self.target.source, self.few)
        kept = _among(reference.kept_indices, self.few)
        hundred = self.campaign.run(HUNDRED, self.target.source, kept)
        more = self._completed(
            reference, hundred, HUNDRED, points=flags.MORE_STEPS_POINTS, images=len(self.places), among=self.few
        )
        return flags.step_order(compare_kept(pgd.kept, one.kept, images=len(self.places)), more)

    def _large_ball(self) -> Check:
        campaign, images = self.campaign, len(self.places)
        rows = self.places.to(campaign.x.device)
        large = Evaluator(
            campaign.judge,
            campaign.x[rows],
            campaign.y[rows],
            epsilon=LARGE_BALL,
            batch_size=campaign.batch_size,
            seed=campaign.seed,
        )
        for source in self.target.sources.values():
            for attack in LARGE:
                large.run(attack, source, large.remaining_indices)
        return flags.large_ball(
            kept=int(large.standing.sum()),
            images=images,
            chance=float(campaign.y[rows].bincount().max()) / images,
            against_small=compare_kept(large.standing, campaign.standing[self.places], images=images),
            epsilon=LARGE_BALL,
        )

    def _zero_gradient(self) -> Check:
        zero, campaign = 0, self.campaign
        for places in torch.split(self.few, campaign.batch_size):
            rows = places.to(campaign.x.device)
            slope = input_gradient(self.target.source, campaign.x[rows], partial(cross_entropy, y=campaign.y[rows]))
            zero += int((slope.gradient == 0.0).flatten(1).all(dim=1).sum())
        return flags.zero_gradient(zero=zero, images=len(self.few))

    def _logit_scale(self, pgd: AttackResult) -> Check:
        """Plain cross-entropy is both attacks that used it: a stronger attack must not pass for a better scale."""
        rescaled = self.campaign.run(RESCALED, self.target.source, self.few, label="pgd20 on rescaled logits")
        reference, images = self._trial(CROSS_ENTROPY), len(self.places)
        plain = pgd.kept & ~torch.isin(self.few, reference.broken_indices)
        left = (int(plain.sum()) / images, len(rescaled.kept_indices) / images)
        return flags.logit_scale(compare_kept(plain, rescaled.kept, images=images), left=left)

    def _loss(self) -> Check:
        reference, images = self._trial(CROSS_ENTROPY), len(self.campaign.x)
        found = []
        for attack in self.suite.attacks:
            if attack.after == CROSS_ENTROPY and attack.attack is not pgd_plus_plus:
                trial = self._trial(attack.name)
                against = self._completed(reference, trial, attack, points=flags.LOSS_POINTS, images=images)
                left = len(reference.kept_indices) / images
                found.append((attack.name, against, (left, left - against.difference)))
        return flags.loss(found)

    def _gradient_free(self) -> Check:
        """What random search broke, before any gradient was asked for, is now attacked with gradients."""
        campaign = self.campaign
        blind = [attack.name for attack in self.suite.attacks if attack.asks == "judge"]
        by_search = _union(trial.broken_indices for trial in self.stages if trial.name in blind)
        seen = _union(trial.broken_indices for trial in self.stages if trial.stage == "white-box")
        missed = by_search[~torch.isin(by_search, seen)]
        for source in self.target.sources.values():
            for attack in (FIFTY, MARGIN):
                missed = campaign.run(attack, source, missed).kept_indices
        left = int((~torch.isin(campaign.clean_indices, torch.cat([seen, by_search]))).sum()) + len(missed)
        return flags.gradient_free(broken=len(missed), left=left, images=len(campaign.x))

    def _transfer(self) -> list[Check]:
        found = []
        for name in self.target.surrogates:
            trials = [trial for trial in self.stages if trial.stage == "transfer" and trial.name.endswith(f": {name}")]
            broken = sum(len(trial.broken_indices) for trial in trials)
            found.append((name, Comparison(len(self.campaign.x), broken, 0)))
        return [flags.transfer(found)] if found else []

    def _completed(
        self,
        first: AttackResult,
        second: AttackResult,
        attack: NamedAttack,
        *,
        points: float,
        images: int,
        among: Tensor | None = None,
    ) -> Comparison:
        """Two attacks, the second run only on what the first left: what it would have left of the others is asked only
        where the answer matters.
        """
        most = Comparison(images, len(second.broken_indices), 0)
        if not most.exceeds(points):
            return most
        others = first.broken_indices if among is None else _among(first.broken_indices, among)
        rest = self.campaign.run(
            attack, self.target.source, others, label=f"{attack.name}, the others", stage=DIAGNOSIS
        )
        return Comparison(images, most.only_first, len(rest.kept_indices))

    def _trial(self, name: str) -> AttackResult:
        return next(trial for trial in self.stages if trial.name == name)


def _among(places: Tensor, those: Tensor) -> Tensor:
    return places[torch.isin(places, those)]


def _union(parts: Iterable[Tensor]) -> Tensor:
    places: Tensor = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *parts]))
    return places
