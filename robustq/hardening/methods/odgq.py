"""ODG-Q: robust quantization via online domain generalization, Algorithm 1 of Tao & Wong 2022 (arXiv:2210.08701).

The paper has no public code and leaves choices open. Each field of :class:`OdgqSettings` is such a choice: its default
is this project's reading, its other values are the alternatives; docs/odgq.md gives the reasons. A batch costs three
forward and two backward passes: the perturbation (line 6), the clean features (line 10, without gradient), and the
weights (line 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustq.hardening.features import FEATURES, FeatureTap
from robustq.hardening.methods.method import (
    AdversarialTraining,
    LossOutput,
    MethodContext,
    attack_generation,
    batch_norm_mode,
)
from robustq.hardening.methods.mmd import BANDWIDTHS, ESTIMATORS, mmd
from robustq.hardening.methods.settings import MethodSettings, choice, number

MOST_DOMAINS = 256
"""Each domain stores a perturbation per slot of the batch; the paper goes to 16."""


@dataclass(frozen=True, kw_only=True)
class OdgqSettings(MethodSettings):
    """The ``[odgq]`` table of a recipe.

    Args:
        domains: N_k, the number of online adversarial domains.
        mmd_weight: lambda of line 10 (the paper: 3; 0.003 for 1 bit). 0 leaves the clean branch out.
        local_scale: epsilon_l as a multiple of epsilon (not given in the paper).
        global_perturbation: ``set``: the set P of Algorithm 1; ``none``: without it (Table IV); ``noise``: fresh
            uniform noise in +-2 epsilon in its place, clipped by line 5 as P is (an ablation that the paper lacks).
        update: P is updated at every ``batch``, as in the algorithm, or once per ``epoch`` (at its first batch; with
            ``tied_to = "sample"`` each row once an epoch).
        tied_to: P belongs to the ``slot`` in the batch, as written, or to the training ``sample`` (memory: N_k training
            sets).
        clip_stored: clip the stored P to +-epsilon; by default P is a raw sum that is clipped on use (line 5).
        project_total: project x_adv into the epsilon-ball; by default the global and the local part, each clipped to
            epsilon, add up to 2 epsilon, as in lines 5 and 9 (the appendix assumes the ball).
        clamp: keep x_g and x_adv in [0, 1]. Outside the input quantizer has no gradient, so that the perturbation of
            black and white pixels would never change again.
        features: what line 10 aligns, see :class:`robustq.hardening.features.FeatureTap`.
        estimator, bandwidth: of the MMD, see :func:`.mmd.mmd`; bandwidth may be a number (sigma^2).
        natural_gradient: differentiate the MMD through the clean branch too (2.67 instead of 2.0 natural steps).
        batch_norm: ``eval``: running statistics in line 6, the batch's in line 10, where only x_adv updates the running
            ones; ``train``: train mode throughout, every forward pass updates them; ``joint``: as eval, with x_0 and
            x_adv normalised in one batch; ``separate``: line 6 with its own batch's statistics, only x_adv updates the
            running ones.
        stored_as: dtype of P; ``float16`` halves its memory and rounds its sums to three digits.
    """

    method = "odgq"

    domains: int = number(4, low=1, high=MOST_DOMAINS, integer=True)
    mmd_weight: float = number(3.0, low=0, high=1e6)
    local_scale: float = number(1.0, low=0, high=1e3, above=True)
    global_perturbation: str = choice("set", ("set", "noise", "none"))
    update: str = choice("batch", ("batch", "epoch"))
    tied_to: str = choice("slot", ("slot", "sample"))
    clip_stored: bool = False
    project_total: bool = False
    clamp: bool = True
    features: str = choice("pooled", FEATURES)
    estimator: str = choice("root", ESTIMATORS)
    bandwidth: str | float = choice("median", BANDWIDTHS, positive_number=True)
    natural_gradient: bool = False
    batch_norm: str = choice("eval", ("eval", "train", "joint", "separate"))
    stored_as: str = choice("float32", ("float32", "float16"))


class Odgq(AdversarialTraining):
    """Algorithm 1, one batch at a time. L_task, with its label smoothing, is the loss of line 6 and of line 10."""

    settings: OdgqSettings

    carried = ("perturbations",)

    def __init__(self, context: MethodContext, settings: OdgqSettings) -> None:
        super().__init__(context, settings)
        self.domain = 0
        self._first_batch_of_epoch = True
        self._tap = FeatureTap(self.model, settings.features)
        slots = context.samples if settings.tied_to == "sample" else min(context.batch_size, context.samples)
        # Line 1. The ablations store no set.
        stored = settings.global_perturbation == "set"
        self.perturbations = torch.zeros(
            (int(settings.domains), slots, *context.image_shape) if stored else (0,),
            dtype=torch.float16 if settings.stored_as == "float16" else torch.float32,
            device=context.device,
        )

    @property
    def passes(self) -> str:
        """Lines 6 and 10; fewer without the MMD."""
        if self.settings.mmd_weight == 0:
            return "2 forward + 2 backward passes"
        return f"3 forward + {3 if self.settings.natural_gradient else 2} backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Line 13: k = epoch mod N_k, from 0."""
        self.domain = epoch % int(self.settings.domains)
        self._first_batch_of_epoch = True

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Lines 4 to 9: the adversarial images of this batch (detached); updates P."""
        settings, epsilon = self.settings, self.epsilon
        # A slice is a view of P and updated in place; indices would make a copy.
        slots = indices if settings.tied_to == "sample" else slice(len(x))
        x_g = self._clamped(x + self._global_part(x, slots).clamp(-epsilon, epsilon))
        p_l = settings.local_scale * epsilon * self._input_gradient(x_g, y).sign()
        # The row of a sample is used once an epoch, so both values of ``update`` are the same there.
        due = settings.update == "batch" or settings.tied_to == "sample" or self._first_batch_of_epoch
        if settings.global_perturbation == "set" and due:
            # Line 8; the range includes its end, otherwise N_k = 1 would never update anything.
            updated = self.perturbations[self.domain :, slots]
            updated += p_l
            if settings.clip_stored:
                updated.clamp_(-epsilon, epsilon)
            if isinstance(slots, Tensor):
                self.perturbations[self.domain :, slots] = updated
        self._first_batch_of_epoch = False
        x_adv = x_g + p_l.clamp(-epsilon, epsilon)
        if settings.project_total:
            x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon)
        return self._clamped(x_adv).detach()

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Line 10: cross-entropy on x_adv + lambda * MMD(features of x_adv, features of x)."""
        settings = self.settings
        if settings.mmd_weight == 0:
            return super().loss(x, x_adv, y, indices)
        if settings.batch_norm == "joint":
            both_logits, both = self._tap(torch.cat([x_adv, x]))
            logits, (features, natural) = both_logits[: len(x)], torch.split(both, len(x))
            natural = natural if settings.natural_gradient else natural.detach()
        else:
            # The clean branch first: in train mode the last update of the running statistics is that of x_adv.
            natural = self._natural_features(x)
            logits, features = self._tap(x_adv)
        gap = mmd(features, natural, estimator=settings.estimator, bandwidth=settings.bandwidth)
        return LossOutput.of(self.cross_entropy(logits, y), logits, weight=settings.mmd_weight, mmd=gap)

    def state_dict(self) -> dict[str, Tensor]:
        """P, (N_k, slots, C, H, W) as stored; k; whether an epoch has just begun; the generator of ``noise``."""
        epoch = {"domain": torch.tensor(self.domain), "first_batch_of_epoch": torch.tensor(self._first_batch_of_epoch)}
        return {**super().state_dict(), **epoch}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.domain = int(state["domain"])
        self._first_batch_of_epoch = bool(state["first_batch_of_epoch"])

    def _global_part(self, x: Tensor, slots: Tensor | slice) -> Tensor:
        kind = self.settings.global_perturbation
        if kind == "set":
            return self.perturbations[self.domain, slots].to(x.dtype)
        if kind == "noise":
            return (self.uniform(*x.shape, like=x) * 4.0 - 2.0) * self.epsilon
        return torch.zeros_like(x)

    def _clamped(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0) if self.settings.clamp else x

    def _input_gradient(self, x_g: Tensor, y: Tensor) -> Tensor:
        """Line 6, of the mean loss (line 7 uses only its sign)."""
        mode = "eval" if self.settings.batch_norm == "joint" else self.settings.batch_norm
        x_g = x_g.detach().requires_grad_()
        with attack_generation(self.model, mode):
            loss = self.cross_entropy(self.model(x_g), y)
            (gradient,) = torch.autograd.grad(loss, x_g)
        return gradient

    def _natural_features(self, x: Tensor) -> Tensor:
        with batch_norm_mode(self.model, "train" if self.settings.batch_norm == "train" else "separate"):
            if self.settings.natural_gradient:
                return self._tap(x)[1]
            with torch.no_grad():
                return self._tap(x)[1]
