"""Runs attacks one after the other: which images are still robust, the worst uint8 image of each, and the cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustq.attacks.ball import round_to_uint8
from robustq.attacks.base import Model
from robustq.attacks.counted import Counted
from robustq.attacks.feature_space import Features
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import margin
from robustq.data import to_float
from robustq.evaluation.accuracy import all_logits, top_classes
from robustq.evaluation.result import AttackResult
from robustq.evaluation.suites import NamedAttack
from robustq.memory import free_memory
from robustq.progress import bar, note

DIAGNOSIS = "diagnosis"
"""The stage of attacks that only the flags need."""

CLEAN, NONE = "clean", "none"
"""Instead of an attack's name: the image is wrong without attack; no attack was run on it."""


class Evaluator:
    """Runs attacks, counts on the judge, and keeps the worst adversarial image of each image.

    Args:
        judge: images (B, C, H, W) -> logits (B, K); its answer to the rounded image decides.
        x, y: float32 (N, C, H, W), uint8 pixels / 255, and int64 (N,), on the device of the gradient models.
        epsilon, batch_size: radius in [0, 1], and images per call of an attack.
        seed: of all random numbers; each image has a generator of its own, from the seed, its index and the attack.

    Attributes:
        clean: (N,) bool on the CPU, right without attack.
        robust: (N,) bool on the CPU, right without attack and under every attack so far.
        predicted: (N,) int64 on the CPU, the judge's classes of the clean images, -1 for NaN.
        classes: K.
        x_adv: float32 like x, per image one that broke it, else the one with the highest margin.
        found_by: N names of the attacks that found it, ``clean`` or ``none``.
        results: of all attacks, in order.
    """

    def __init__(self, judge: Model, x: Tensor, y: Tensor, *, epsilon: float, batch_size: int, seed: int) -> None:
        self.judge, self.x, self.y = judge, x, y
        self.epsilon, self.batch_size, self.seed = epsilon, batch_size, seed
        logits = all_logits(judge, x, batch_size=batch_size)
        self.predicted, self.classes = top_classes(logits), logits.shape[1]
        self.clean = self.predicted == y.cpu()
        self.robust = self.clean.clone()
        self.x_adv = x.clone()
        self.found_by = [NONE if right else CLEAN for right in self.clean.tolist()]
        self.results: list[AttackResult] = []
        self._margins = torch.full((len(x),), -torch.inf)
        self._judge_queries = 0

    @property
    def remaining_indices(self) -> Tensor:
        """(k,) int64: the images that are still robust."""
        return self.robust.nonzero()[:, 0]

    @property
    def clean_indices(self) -> Tensor:
        """(k,) int64: the images that are right without attack."""
        return self.clean.nonzero()[:, 0]

    def run(
        self,
        attack: NamedAttack,
        model: Model,
        indices: Tensor,
        *,
        label: str | None = None,
        stage: str | None = None,
        features: Features | None = None,
        surrogate: Model | None = None,
    ) -> AttackResult:
        """Attack the images of some indices (n,), int64 on the CPU, through ``model``, and count on the judge.

        Args:
            label, stage: in results; None: the attack's own.
            features: of the model's inner layer, for an attack that takes them.
            surrogate: another network, for an attack that takes surrogates.
        """
        start = time.perf_counter()
        name = label or attack.name
        kept = [torch.ones(0, dtype=torch.bool)]
        self._judge_queries = queries = steps = 0
        with bar(f"attack: {name}", len(indices)) as progress:
            first = 0
            while first < len(indices):
                batch = indices[first : first + self.batch_size]
                counted = Counted(model, images=len(batch))
                inputs: dict[str, Any] = {}
                if features is not None:
                    inputs["features"] = counted.sharing(features)
                if surrogate is not None:
                    inputs["surrogates"] = [counted.sharing(surrogate)]
                right = self._within_memory(attack, counted, batch, name, inputs)
                # The passes of a batch that did not fit were made as well.
                queries += int(counted.queries.sum())
                steps += int(counted.gradient_steps.sum())
                if right is not None:
                    kept.append(right)
                    first += len(batch)
                    progress.advance(len(batch))
        result = AttackResult(
            name=name,
            stage=stage or attack.stage,
            indices=indices,
            kept=torch.cat(kept),
            remaining=int(self.robust.sum()),
            queries=queries + self._judge_queries,
            gradient_steps=steps,
            seconds=time.perf_counter() - start,
        )
        self.results.append(result)
        return result

    def start_from(self, x_adv: Tensor, found_by: Sequence[str], *, broken: Tensor) -> None:
        """Start from adversarial images of a smaller ball: x_adv uint8 (N, C, H, W), and broken (N,) bool by them."""
        rows = broken.to(self.x.device)
        self.x_adv[rows] = to_float(x_adv[broken].to(self.x.device))
        self.robust &= ~broken
        for index in broken.nonzero()[:, 0].tolist():
            self.found_by[index] = found_by[index]

    def _within_memory(
        self, attack: NamedAttack, model: Model, indices: Tensor, name: str, inputs: dict[str, Any]
    ) -> Tensor | None:
        """The answer of `_attack`; None where the GPU's memory is too small, after halving :attr:`batch_size`.

        No result depends on the batch, and a single image that does not fit raises torch's error.
        """
        try:
            return self._attack(attack, model, indices, name, inputs)
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
            self.batch_size = len(indices) // 2
        # Behind the handler, which keeps the tensors of the failed call alive.
        free_memory()
        note(f"note    out of memory in {name}: {self.batch_size} images at a time from here on")
        return None

    def _attack(self, attack: NamedAttack, model: Model, indices: Tensor, name: str, inputs: dict[str, Any]) -> Tensor:
        """(n,) bool, right under the attack."""
        rows = indices.to(self.x.device)
        broken = torch.zeros(len(indices), dtype=torch.bool)

        def breaks_judge(x_adv: Tensor, which: Tensor) -> Tensor:
            right = self._judge(x_adv, indices[which.cpu()], name)
            broken[which.cpu()] |= ~right
            return (~right).to(x_adv.device)

        generators = ImageGenerators.of(self.seed, indices, attack=attack.name)
        accepted = inspect.signature(attack.attack).parameters
        for argument, value in (("generator", generators), ("criterion", breaks_judge)):
            if argument in accepted:
                inputs[argument] = value
        x_adv = attack.attack(model, self.x[rows], self.y[rows], epsilon=self.epsilon, **attack.settings, **inputs)
        # Images that broke once stay broken, also with a judge that answers at random.
        left = (~broken).nonzero()[:, 0]
        broken[left] = ~self._judge(x_adv[left.to(x_adv.device)], indices[left], name)
        return ~broken

    def _judge(self, x_adv: Tensor, indices: Tensor, name: str) -> Tensor:
        """(n,) bool, right on the rounded images; keeps the worst of them."""
        rows = indices.to(self.x.device)
        y = self.y[rows].cpu()
        rounded = round_to_uint8(x_adv, self.x[rows], epsilon=self.epsilon)
        logits = all_logits(self.judge, rounded, batch_size=self.batch_size)
        self._judge_queries += len(indices)
        right = top_classes(logits) == y
        if self.classes < 2 or not len(indices):
            return right
        margins = margin(logits, y).nan_to_num(nan=torch.inf)
        # A broken image keeps the adversarial image that broke it first: it is the cheapest attack's.
        better = self.robust[indices] & (~right | (margins > self._margins[indices]))
        taken = indices[better]
        self.x_adv[taken.to(self.x.device)] = rounded[better.to(rounded.device)]
        self._margins[taken] = margins[better].float()
        for index in taken.tolist():
            self.found_by[index] = name
        self.robust[indices[~right]] = False
        return right
