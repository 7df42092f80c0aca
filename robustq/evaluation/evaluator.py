"""Images under attack: which still stand, the worst uint8 picture of each, and what was spent on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustq.attacks.ball import round_to_uint8
from robustq.attacks.base import Counted, Model
from robustq.attacks.feature_space import Features
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import margin
from robustq.data import to_float
from robustq.evaluation.accuracy import answers, classes
from robustq.evaluation.suites import NamedAttack
from robustq.progress import bar

DIAGNOSIS = "diagnosis"
"""The stage of attacks that were run for the flags' sake."""

CLEAN, NONE = "clean", "none"
"""In place of an attack's name: the image is wrong without attack; no attack was run on it."""


@dataclass(frozen=True)
class AttackResult:
    """One attack on some of the images.

    Args:
        name: of the attack, with the backward rule or the surrogate where there are several.
        stage: of the suite.
        places: (n,) int64, the images it was run on.
        kept: (n,) bool, right under this attack.
        standing: images of the whole evaluation that no attack has broken so far.
        queries: answers that the judge gave, and forward passes of other models without gradient, one per image.
        gradient_steps: forward passes with gradient, one per image.
        seconds: wall time.
    """

    name: str
    stage: str
    places: Tensor
    kept: Tensor
    standing: int
    queries: int
    gradient_steps: int
    seconds: float

    @property
    def kept_indices(self) -> Tensor:
        """(k,) int64: the images that are right under this attack."""
        return self.places[self.kept]

    @property
    def broken_indices(self) -> Tensor:
        """(b,) int64: the images that it broke."""
        return self.places[~self.kept]

    def to_dict(self, *, images: int) -> dict[str, Any]:
        """Plain values for JSON; ``accuracy`` is what stands afterwards, as a share of ``images``."""
        return {
            "stage": self.stage,
            "attack": self.name,
            "images": len(self.places),
            "kept": int(self.kept.sum()),
            "accuracy": self.standing / images,
            "queries": self.queries,
            "gradient_steps": self.gradient_steps,
            "seconds": self.seconds,
        }


class Evaluator:
    """Runs attacks one after the other and remembers the worst of them for each image.

    Args:
        judge: images (B, C, H, W) -> logits (B, K); its answer to the rounded picture decides.
        x: float32 (N, C, H, W), uint8 pixels / 255, on the device of the sources.
        y: int64 (N,), on the same device.
        epsilon: radius in [0, 1].
        batch_size: images an attack works on at once.
        seed: of all random streams; with an image's place and the attack's name it gives each image its own.

    Attributes:
        clean: (N,) bool on the CPU, right without attack.
        standing: (N,) bool on the CPU, right without attack and under every attack so far.
        predicted: (N,) int64 on the CPU, the judge's classes of the clean images, -1 for NaN.
        classes: K.
        x_adv: float32 like x, per image a picture that broke it, else the one with the highest margin.
        found_by: N names, of the attack that found it, ``clean`` or ``none``.
        trials: in the order they were run.
    """

    def __init__(self, judge: Model, x: Tensor, y: Tensor, *, epsilon: float, batch_size: int, seed: int) -> None:
        self.judge, self.x, self.y = judge, x, y
        self.epsilon, self.batch_size, self.seed = epsilon, batch_size, seed
        logits = answers(judge, x, batch_size=batch_size)
        self.predicted, self.classes = classes(logits), logits.shape[1]
        self.clean = self.predicted == y.cpu()
        self.standing = self.clean.clone()
        self.x_adv = x.clone()
        self.found_by = [NONE if right else CLEAN for right in self.clean.tolist()]
        self.trials: list[AttackResult] = []
        self._margins = torch.full((len(x),), -torch.inf)
        self._asked = 0

    @property
    def remaining_indices(self) -> Tensor:
        """(k,) int64: the images that nothing has broken."""
        return self.standing.nonzero()[:, 0]

    @property
    def clean_indices(self) -> Tensor:
        """(k,) int64: the images that are right without attack."""
        return self.clean.nonzero()[:, 0]

    def run(
        self,
        attack: NamedAttack,
        model: Model,
        places: Tensor,
        *,
        label: str | None = None,
        stage: str | None = None,
        features: Features | None = None,
        surrogate: Model | None = None,
    ) -> AttackResult:
        """Attack the images at ``places`` through ``model``, and count on the judge.

        Args:
            attack: which.
            model: what it asks; images -> logits.
            places: (n,) int64 on the CPU.
            label: its name in results; None: its own.
            stage: of the suite; None: its own.
            features: the model's inner layer, for an attack that asks about it.
            surrogate: another network, for an attack that finds its pictures there.
        """
        start = time.perf_counter()
        name = label or attack.name
        kept = torch.ones(len(places), dtype=torch.bool)
        self._asked = queries = steps = done = 0
        tallied = None if surrogate is None else _Tally(surrogate)
        with bar(f"attack: {name}", len(places)) as progress:
            for batch in torch.split(places, self.batch_size) if len(places) else ():
                counted = Counted(model, images=len(batch))
                others: dict[str, Any] = {}
                if features is not None:
                    others["features"] = counted.sharing(features)
                if tallied is not None:
                    others["surrogates"] = [tallied]
                kept[done : done + len(batch)] = self._attack(attack, counted, batch, name, others)
                done += len(batch)
                progress.advance(len(batch))
                queries += int(counted.queries.sum())
                steps += int(counted.gradient_steps.sum())
        self.standing[places[~kept]] = False
        trial = AttackResult(
            name=name,
            stage=stage or attack.stage,
            places=places,
            kept=kept,
            standing=int(self.standing.sum()),
            queries=queries + self._asked + (tallied.queries if tallied else 0),
            gradient_steps=steps + (tallied.gradient_steps if tallied else 0),
            seconds=time.perf_counter() - start,
        )
        self.trials.append(trial)
        return trial

    def start_from(self, pictures: Tensor, found_by: Sequence[str], *, broken: Tensor) -> None:
        """Take over what broke images in a smaller ball, which lies in this one.

        Args:
            pictures: uint8 (N, C, H, W).
            found_by: N names.
            broken: (N,) bool, the images that their picture broke.
        """
        rows = broken.to(self.x.device)
        self.x_adv[rows] = to_float(pictures[broken].to(self.x.device))
        self.standing &= ~broken
        for place in broken.nonzero()[:, 0].tolist():
            self.found_by[place] = found_by[place]

    def _attack(self, attack: NamedAttack, model: Model, places: Tensor, name: str, others: dict[str, Any]) -> Tensor:
        """(n,) bool, right under the attack."""
        rows = places.to(self.x.device)
        x, y = self.x[rows], self.y[rows]
        broken = torch.zeros(len(places), dtype=torch.bool)

        def breaks(x_adv: Tensor, which: Tensor) -> Tensor:
            # Rounded pictures, on the judge: what breaks the source alone must not end the hunt.
            right = self._judged(x_adv, places[which.cpu()], name)
            broken[which.cpu()] |= ~right
            return (~right).to(x_adv.device)

        x_adv = attack.run(
            model,
            x,
            y,
            epsilon=self.epsilon,
            generator=ImageGenerators.of(self.seed, places, attack=attack.name),
            criterion=breaks,
            **others,
        )
        # A judge that answers at random was broken if it ever was.
        left = (~broken).nonzero()[:, 0]
        broken[left] = ~self._judged(x_adv[left.to(x_adv.device)], places[left], name)
        return ~broken

    def _judged(self, x_adv: Tensor, places: Tensor, name: str) -> Tensor:
        """(n,) bool, right on the rounded pictures; the worst of them are remembered."""
        rows = places.to(self.x.device)
        y = self.y[rows].cpu()
        rounded = round_to_uint8(x_adv, self.x[rows], epsilon=self.epsilon)
        logits = answers(self.judge, rounded, batch_size=self.batch_size)
        self._asked += len(places)
        right = (classes(logits) == y) if len(places) else torch.ones(0, dtype=torch.bool)
        if self.classes < 2 or not len(places):
            return right
        margins = margin(logits, y).nan_to_num(nan=torch.inf)
        # Once broken, an image keeps the picture that broke it first: it is the cheapest attack's.
        better = self.standing[places] & (~right | (margins > self._margins[places]))
        taken = places[better]
        self.x_adv[taken.to(self.x.device)] = rounded[better.to(rounded.device)]
        self._margins[taken] = margins[better].float()
        for place in taken.tolist():
            self.found_by[place] = name
        self.standing[places[~right]] = False
        return right


class _Tally:
    """A model whose passes are counted in the sum, for an attack that picks images out of its batch by itself."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.queries = self.gradient_steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self.gradient_steps += len(x)
        else:
            self.queries += len(x)
        return self.model(x)
