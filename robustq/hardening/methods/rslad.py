"""RSLAD: distilling a robust teacher.

A robust network that another one learns from: its answers to training images, cached or asked for batch by batch.

RSLAD: a small network learns robustness from a robust teacher (Zi et al. 2021, arXiv:2108.07969, Eq. 6 and 7).

Loss = 5/6 KL(T(x) || S(x_adv)) + 1/6 KL(T(x) || S(x)), where x_adv maximises the divergence of S(x_adv) from T(x): the
teacher's soft labels stand for the labels everywhere, in crafting too. The paper writes KL(S, T) and its code computes
what stands here, the divergence that differs from the cross-entropy against soft labels by a constant.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from robustq.attacks.ball import project, uniform_start
from robustq.attacks.base import input_gradient
from robustq.attacks.losses import kl
from robustq.data import Split
from robustq.errors import ModelFileError, RecipeError
from robustq.hardening.methods.method import (
    AUTO,
    Drawing,
    Step,
    crafting,
    length,
    length_errors,
    mode_errors,
    step_length,
)
from robustq.progress import bar
from robustq.recipe.schema import number_errors, shown, unknown_value

BATCH = 500
"""Images that the teacher is shown at a time when its answers are cached; the same in every run, for the same bits."""


class Teacher(Protocol):
    """Gives soft labels."""

    @property
    def passes(self) -> int:
        """Forward passes of the teacher that a batch costs."""

    @property
    def digest(self) -> Tensor:
        """(32,) uint8, on the CPU: names the teacher's weights and how it is asked, for a run that is resumed."""

    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """Its answer to augmented training images (B, C, H, W) at ``places`` (B,): (B, K), without gradient."""


class AskedTeacher:
    """Looks at the very images that the student is trained on: one forward pass of the teacher a batch.

    Args:
        network: on the device of the batches; put into eval mode.
    """

    passes = 1

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()
        self.digest = _digest(network, "asked")

    @torch.no_grad()
    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """See :meth:`Teacher.logits`."""
        answer: Tensor = self._network(x)
        return answer


class CachedTeacher:
    """Has looked once at each training image as it is in the data set, and answers so for every crop of it.

    Where training augments, this deviates from arXiv:2108.07969, whose teacher sees the crop. Answers that are exact
    for every crop would not be worth keeping: a CIFAR image has 162 crops and mirrorings, more than a run has epochs,
    so that few would be used twice. The deviation is not small (docs/methods.md has figures), hence no default. Where
    training mirrors images, the soft label is the mean of the probabilities of the image and its mirror image, so that
    it does not depend on which of the two the student sees.

    The answers are a pure function of teacher, data and device, so a resumed run computes them again. Memory: 4 bytes
    for each class of each training image (CIFAR-10: 1.8 MB, ImageNet: 5.1 GB), on the device.

    Args:
        network: on ``device``; put into eval mode.
        split: the training images.
        mirrored: whether training mirrors them.
        device: where the network and the batches are.
    """

    passes = 0

    def __init__(self, network: nn.Module, split: Split, *, mirrored: bool, device: torch.device) -> None:
        self.digest = _digest(network, f"cached, mirrored {mirrored}")
        network.eval()
        parts = []
        with torch.no_grad(), bar("teacher", len(split)) as progress:
            # Without a seed the images come in their own order and are not augmented.
            for batch in split.batches(BATCH, device=device):
                logits: Tensor = network(batch.x)
                if mirrored:
                    mirror: Tensor = network(batch.x.flip(-1))
                    # In logarithms: a probability that rounds to 0 would make the divergence NaN.
                    logits = torch.logaddexp(logits.log_softmax(dim=1), mirror.log_softmax(dim=1)) - math.log(2)
                parts.append(logits)
                progress.advance(len(batch.y))
        self._answers = torch.cat(parts)

    def logits(self, x: Tensor, places: Tensor) -> Tensor:
        """See :meth:`Teacher.logits`; log-probabilities where images are mirrored."""
        return self._answers[places]


def _digest(network: nn.Module, how: str) -> Tensor:
    seen = hashlib.sha256(how.encode())
    for name, value in sorted(network.state_dict().items()):
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(seen.digest()), dtype=torch.uint8)


TEACHER_SEES = ("augmented", "original")


@dataclass(frozen=True, kw_only=True)
class RsladSettings:
    """The ``[rslad]`` table of a recipe.

    Args:
        teacher: path of the robust teacher, a model file that robustq wrote.
        teacher_sees: ``augmented``: what the student sees, batch by batch, as in the paper; where nothing is augmented
            that is always the same, so its answers are cached. ``original``: each training image as it is in the data
            set, once, before the first batch, for all its crops: for teachers that are dear to ask. What that deviates
            by is told in :class:`.teacher.CachedTeacher`.
        steps: crafting steps (the paper: 10).
        step_size: ``auto`` (see :func:`.crafting.step_length`), or a length such as ``"2/255"``.
        start_size: half the width of the uniform random start; at least 1/255, for the reason given in
            :class:`.trades.TradesSettings`.
        clean_weight: share of the clean images in the loss (the paper: 1/6); 0 leaves their pass out.
        batch_norm: of the crafting passes (:data:`.crafting.MODES`); ``eval`` as in the paper's code.
    """

    teacher: str = ""
    teacher_sees: str = "augmented"
    steps: int = 1
    step_size: str | float = AUTO
    start_size: str | float = "1/255"
    clean_weight: float = 1 / 6
    batch_norm: str = "eval"

    def __post_init__(self) -> None:
        faults = number_errors("rslad.steps", self.steps, low=1, high=1000, integer=True)
        faults += length_errors("rslad.step_size", self.step_size, words=(AUTO,))
        faults += length_errors("rslad.start_size", self.start_size, least=1 / 255)
        faults += number_errors("rslad.clean_weight", self.clean_weight, low=0, high=1)
        faults += mode_errors("rslad.batch_norm", self.batch_norm)
        if self.teacher_sees not in TEACHER_SEES:
            faults.append(unknown_value("rslad.teacher_sees", self.teacher_sees, TEACHER_SEES))
        if self.teacher != str(self.teacher):
            faults.append(f"rslad.teacher = {shown(self.teacher)} is not a path")
        if faults:
            raise RecipeError("; ".join(faults))


class Rslad(Drawing):
    """Crafting steps away from the teacher's answer, then one step of training towards it. Labels are not used.

    Deviation from the paper's code: the divergence is summed over the classes and averaged over the batch. The code
    averages over the classes too, which makes the loss so many times smaller.

    Args:
        model: the student, in train mode, images in [0, 1] -> logits.
        settings: the ``[rslad]`` table.
        teacher: gives the soft labels.
        epsilon: radius of the threat model, in [0, 1].
        generator: CPU generator of the random starts.
    """

    adversarial = True

    def __init__(
        self,
        model: nn.Module,
        settings: RsladSettings,
        *,
        teacher: Teacher,
        epsilon: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(generator)
        self.model = model
        self.settings = settings
        self.teacher = teacher
        self.epsilon = epsilon
        self._soft = torch.empty(0)

    @property
    def passes(self) -> str:
        """Cost of a batch; the teacher's forward pass, where there is one, is named apart."""
        count = int(self.settings.steps) + (2 if self.settings.clean_weight else 1)
        teacher = " + 1 teacher's forward" if self.teacher.passes else ""
        return f"{count} forward{teacher} + {count} backward passes"

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """Ascent of the divergence from the teacher's answer to x, inside the ball and inside [0, 1]."""
        settings, epsilon, steps = self.settings, self.epsilon, int(self.settings.steps)
        soft = self._soft = self.teacher.logits(x, places)
        step = step_length(settings.step_size, epsilon=epsilon, steps=steps)
        start = uniform_start(x, epsilon=length(settings.start_size), generator=self.generator)
        x_adv = project(start, x, epsilon=epsilon)
        with crafting(self.model, settings.batch_norm):
            for _ in range(steps):
                gradient = input_gradient(self.model, x_adv, lambda logits: kl(logits, soft)).gradient
                x_adv = project(x_adv + step * gradient.sign(), x, epsilon=epsilon)
        return x_adv

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """Both divergences from the soft labels that :meth:`perturb` got; in train mode, each by its own statistics."""
        weight = self.settings.clean_weight
        logits = self.model(x_adv)
        gap = kl(logits, self._soft).mean()
        if not weight:
            return Step(gap, {"kl": gap.detach()}, logits.detach())
        clean = kl(self.model(x), self._soft).mean()
        return Step(
            (1 - weight) * gap + weight * clean, {"kl": gap.detach(), "clean_kl": clean.detach()}, logits.detach()
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, and which teacher it is."""
        return {**super().state_dict(), "teacher": self.teacher.digest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the generator back.

        Raises:
            ModelFileError: the run began with another teacher, which a resumed run cannot go on without.
        """
        if not torch.equal(state["teacher"].cpu(), self.teacher.digest):
            raise ModelFileError(
                f"{self.settings.teacher}: is not the teacher any more that the run began with; put that file back"
            )
        super().load_state_dict(state)
