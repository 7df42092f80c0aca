"""ODG-Q: robust quantization via online domain generalization, Algorithm 1 of Tao & Wong 2022 (arXiv:2210.08701).

The paper has no public code and leaves choices open. Each field of :class:`OdgqSettings` is one of them: its default is
the reading this project defends, its other values are the alternatives, and docs/odgq.md says why. Three passes forward
and two backward per batch: the perturbation (line 6), the clean features (line 10, without gradient), and the weights
(line 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustq.errors import RecipeError
from robustq.hardening.features import FEATURES, FeatureTap
from robustq.hardening.methods.method import PLAIN_CROSS_ENTROPY, CrossEntropy, Step, crafting, normalised, task_step
from robustq.hardening.methods.mmd import mmd
from robustq.recipe.schema import shown, unknown_value

MOST_DOMAINS = 256
"""Each domain keeps a perturbation per slot of the batch; the paper goes to 16."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "global_perturbation": ("set", "noise", "none"),
    "update": ("batch", "epoch"),
    "tied_to": ("slot", "sample"),
    "features": FEATURES,
    "estimator": ("root", "squared"),
    "bandwidth": ("median", "mean", "mixture"),
    "batch_norm": ("eval", "train", "joint", "separate"),
    "stored_as": ("float32", "float16"),
}


@dataclass(frozen=True, kw_only=True)
class OdgqSettings:
    """The ``[odgq]`` table of a recipe.

    Args:
        domains: N_k, the number of online adversarial domains.
        mmd_weight: lambda of line 10 (the paper: 3; 0.003 for 1 bit). 0 leaves the clean branch out altogether.
        local_scale: epsilon_l as a multiple of epsilon (not given in the paper).
        global_perturbation: ``set``: the set P of Algorithm 1; ``none``: without it (Table IV); ``noise``: fresh
            uniform noise in +-2 epsilon in its place, clipped by line 5 as P is (an ablation that the paper lacks).
        update: P is updated at every ``batch``, as the algorithm writes, or once per ``epoch`` (its first batch; each
            row once an epoch when it is tied to a sample).
        tied_to: P belongs to the ``slot`` in the batch, as written, or to the training ``sample`` (memory: N_k training
            sets).
        clip_stored: clip the stored P to +-epsilon; by default P is a raw sum that is clipped on use (line 5).
        project_total: bring x_adv back into the epsilon-ball; by default the global and the local part, each
            clipped to epsilon, add up to as much as 2 epsilon, as lines 5 and 9 write (the appendix assumes the ball).
        clamp: keep x_g and x_adv in [0, 1]. Outside, the input quantizer has no gradient and black pixels would freeze.
        features: what line 10 aligns, see :class:`robustq.hardening.features.FeatureTap`.
        estimator, bandwidth: of the MMD, see :func:`.mmd.mmd`; bandwidth may be a number (sigma^2).
        natural_gradient: let the MMD's gradient flow through the clean branch too (2.67 instead of 2.0 natural steps).
        batch_norm: ``eval``: running statistics in line 6, the batch's in line 10, where only x_adv moves the running
            ones; ``train``: plain train mode throughout, every forward moves them; ``joint``: as eval, with x_0 and
            x_adv normalised together in one batch; ``separate``: line 6 with its own batch's statistics, only x_adv
            moves the running ones.
        stored_as: type of the numbers in P; ``float16`` halves its memory and rounds its sums to three digits.
    """

    domains: int = 4
    mmd_weight: float = 3.0
    local_scale: float = 1.0
    global_perturbation: str = "set"
    update: str = "batch"
    tied_to: str = "slot"
    clip_stored: bool = False
    project_total: bool = False
    clamp: bool = True
    features: str = "pooled"
    estimator: str = "root"
    bandwidth: str | float = "median"
    natural_gradient: bool = False
    batch_norm: str = "eval"
    stored_as: str = "float32"

    def __post_init__(self) -> None:
        faults = [
            unknown_value(f"odgq.{key}", getattr(self, key), allowed)
            for key, allowed in _CHOICES.items()
            if getattr(self, key) not in allowed and not (key == "bandwidth" and _positive(self.bandwidth))
        ]
        if not (1 <= self.domains <= MOST_DOMAINS and self.domains == int(self.domains)):
            faults.append(f"odgq.domains = {shown(self.domains)} must be an integer from 1 to {MOST_DOMAINS}")
        if not 0 <= self.mmd_weight <= 1e6:
            faults.append(f"odgq.mmd_weight = {shown(self.mmd_weight)} must be a number from 0 to 1000000")
        if not 0 < self.local_scale <= 1e3:
            faults.append(f"odgq.local_scale = {shown(self.local_scale)} must be over 0 and at most 1000")
        if faults:
            raise RecipeError("; ".join(faults))


def _positive(value: str | float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < float("inf")


class Odgq:
    """Algorithm 1, one batch at a time.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the readings taken.
        epsilon: radius of the threat model, in [0, 1].
        batch_size: B, the number of slots of P.
        image_shape: (C, H, W).
        samples: number of training images, for ``tied_to = "sample"``.
        device: where P lives.
        generator: CPU generator of the ``noise`` ablation.
        cross_entropy: L_task, in line 6 as in line 10.
    """

    adversarial = True
    repeats = 1

    def __init__(
        self,
        model: nn.Module,
        settings: OdgqSettings,
        *,
        epsilon: float,
        batch_size: int,
        image_shape: tuple[int, int, int],
        samples: int,
        device: torch.device,
        generator: torch.Generator,
        cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY,
    ) -> None:
        self.model = model
        self.cross_entropy = cross_entropy
        self.settings = settings
        self.epsilon = epsilon
        self.domain = 0
        self._first_batch_of_epoch = True
        self._generator = generator
        self._tap = FeatureTap(model, settings.features)
        slots = samples if settings.tied_to == "sample" else min(batch_size, samples)
        stored = settings.global_perturbation == "set"
        # Line 1. The ablations keep no set at all.
        self.perturbations = torch.zeros(
            (int(settings.domains), slots, *image_shape) if stored else (0,),
            dtype=torch.float16 if settings.stored_as == "float16" else torch.float32,
            device=device,
        )

    @property
    def passes(self) -> str:
        """Cost of a batch."""
        if self.settings.mmd_weight == 0:
            return "2 forward + 2 backward passes"
        return f"3 forward + {3 if self.settings.natural_gradient else 2} backward passes"

    def begin_epoch(self, epoch: int) -> None:
        """Line 13: k = epoch mod N_k, from 0."""
        self.domain = epoch % int(self.settings.domains)
        self._first_batch_of_epoch = True

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """Lines 4 to 9: the adversarial images of this batch (detached); updates P."""
        settings, epsilon = self.settings, self.epsilon
        # A slice of slots is written to where it lies; any rows would be copied out and back.
        slots = places if settings.tied_to == "sample" else slice(len(x))
        x_g = self._clamped(x + self._global_part(x, slots).clamp(-epsilon, epsilon))
        p_l = settings.local_scale * epsilon * self._input_gradient(x_g, y).sign()
        # A sample's own row is met once an epoch anyway, so that both readings of "when" are the same there.
        due = settings.update == "batch" or settings.tied_to == "sample" or self._first_batch_of_epoch
        if settings.global_perturbation == "set" and due:
            # Line 8; the range is read with its end included, else N_k = 1 would never update anything.
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

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Line 10: cross-entropy on x_adv + lambda * MMD(features of x_adv, features of x)."""
        settings = self.settings
        if settings.mmd_weight == 0:
            return task_step(self.model, x_adv, y, cross_entropy=self.cross_entropy)
        if settings.batch_norm == "joint":
            both_logits, both = self._tap(torch.cat([x_adv, x]))
            logits, (features, natural) = both_logits[: len(x)], torch.split(both, len(x))
            natural = natural if settings.natural_gradient else natural.detach()
        else:
            # The clean branch first, so that the running statistics end on x_adv in train mode as well.
            natural = self._natural_features(x)
            logits, features = self._tap(x_adv)
        task = self.cross_entropy(logits, y)
        bandwidth = settings.bandwidth
        gap = mmd(features, natural, estimator=settings.estimator, bandwidth=bandwidth)  # type: ignore[arg-type]
        return Step(
            task + settings.mmd_weight * gap,
            {"cross_entropy": task.detach(), "mmd": gap.detach()},
            logits.detach(),
        )

    def after_backward(self, x_adv: Tensor) -> None:
        """Line 8 has been carried out by :meth:`perturb`."""

    def state_dict(self) -> dict[str, Tensor]:
        """P, (N_k, slots, C, H, W) as it is stored; k; whether an epoch has just begun; the generator of ``noise``."""
        return {
            "perturbations": self.perturbations,
            "domain": torch.tensor(self.domain),
            "first_batch_of_epoch": torch.tensor(self._first_batch_of_epoch),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        self.perturbations.copy_(state["perturbations"])
        self.domain = int(state["domain"])
        self._first_batch_of_epoch = bool(state["first_batch_of_epoch"])
        self._generator.set_state(state["generator"].cpu())

    def _global_part(self, x: Tensor, slots: Tensor | slice) -> Tensor:
        kind = self.settings.global_perturbation
        if kind == "set":
            return self.perturbations[self.domain, slots].to(x.dtype)
        if kind == "noise":
            drawn = torch.rand(x.shape, generator=self._generator).to(x.device)
            return (drawn * 4.0 - 2.0) * self.epsilon
        return torch.zeros_like(x)

    def _clamped(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0) if self.settings.clamp else x

    def _input_gradient(self, x_g: Tensor, y: Tensor) -> Tensor:
        """Line 6, of the mean loss (its sign is all that line 7 uses)."""
        mode = "eval" if self.settings.batch_norm == "joint" else self.settings.batch_norm
        x_g = x_g.detach().requires_grad_()
        with crafting(self.model, mode):
            loss = self.cross_entropy(self.model(x_g), y)
            (gradient,) = torch.autograd.grad(loss, x_g)
        return gradient

    def _natural_features(self, x: Tensor) -> Tensor:
        with normalised(self.model, "train" if self.settings.batch_norm == "train" else "separate"):
            if self.settings.natural_gradient:
                return self._tap(x)[1]
            with torch.no_grad():
                return self._tap(x)[1]
