"""RSLAD: a small network learns robustness from a robust teacher (Zi et al. 2021, arXiv:2108.07969, Eq. 6 and 7).

Loss = 5/6 KL(T(x) || S(x_adv)) + 1/6 KL(T(x) || S(x)), where x_adv maximises the divergence of S(x_adv) from T(x): the
teacher's soft labels replace the labels, in attack generation too. The paper writes KL(S, T); its code computes the
divergence above, which differs from the cross-entropy against soft labels by a constant.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustq.attacks.ball import project, uniform_start
from robustq.attacks.base import input_gradient
from robustq.attacks.losses import kl
from robustq.data import Split
from robustq.errors import ModelFileError, UsageError
from robustq.hardening.methods.method import (
    AdversarialTraining,
    LossOutput,
    MethodContext,
    attack_generation,
)
from robustq.hardening.methods.settings import AUTO, MethodSettings, bn_mode, choice, number, path, size
from robustq.progress import bar
from robustq.recipe import parse_epsilon

BATCH = 500
"""Images per pass when the teacher's logits are cached; the same in every run, so that the bits are the same."""


class OnlineTeacher:
    """Gets the augmented images that the student gets: one forward pass of the teacher for each batch.

    ``network`` is on the device of the batches, and is set to eval mode.
    """

    passes = 1

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()
        self.digest = _digest(network, "asked")

    @torch.no_grad()
    def logits(self, x: Tensor, indices: Tensor) -> Tensor:
        """See :meth:`.method.Teacher.logits`."""
        logits: Tensor = self._network(x)
        return logits


class CachedTeacher:
    """Gets each training image once, without augmentation; all crops of an image have the same soft label.

    With augmentation this deviates from arXiv:2108.07969, whose teacher gets the crop. The deviation is not small
    (docs/methods.md has figures), so it is not the default. Caching the logits of every crop would not pay: a CIFAR
    image has 162 crops and flips, more than a run has epochs. If training flips images, the soft label is the mean of
    the probabilities of the image and its mirror image.

    The logits are a pure function of teacher, data and device; a resumed run computes them again. Memory: 4 bytes for
    each class of each training image (CIFAR-10: 1.8 MB, ImageNet: 5.1 GB), on the device.

    Args:
        network: on ``device``, as the batches; set to eval mode.
        split: the training images, which are ``mirrored`` if training flips them.
    """

    passes = 0

    def __init__(self, network: nn.Module, split: Split, *, mirrored: bool, device: torch.device) -> None:
        self.digest = _digest(network, f"cached, mirrored {mirrored}")
        network.eval()
        parts = []
        with torch.no_grad(), bar("teacher", len(split)) as progress:
            # Without a seed the images are in their own order and not augmented.
            for batch in split.batches(BATCH, device=device):
                logits: Tensor = network(batch.x)
                if mirrored:
                    mirror: Tensor = network(batch.x.flip(-1))
                    # As logarithms: a probability that rounds to 0 would make the divergence NaN.
                    logits = torch.logaddexp(logits.log_softmax(dim=1), mirror.log_softmax(dim=1)) - math.log(2)
                parts.append(logits)
                progress.advance(len(batch.y))
        self._logits = torch.cat(parts)

    def logits(self, x: Tensor, indices: Tensor) -> Tensor:
        """See :meth:`.method.Teacher.logits`; log-probabilities where images are mirrored."""
        return self._logits[indices]


def _digest(network: nn.Module, how: str) -> Tensor:
    seen = hashlib.sha256(how.encode())
    for name, value in sorted(network.state_dict().items()):
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(seen.digest()), dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class RsladSettings(MethodSettings):
    """The ``[rslad]`` table of a recipe.

    Args:
        teacher: path of the robust teacher, a model file of robustq.
        teacher_sees: ``augmented``: the images that the student gets, as in the paper (logits are cached if nothing is
            augmented). ``original``: each training image once, without augmentation, for all its crops: for slow
            teachers, a deviation (:class:`CachedTeacher`).
        steps: of attack generation (the paper: 10).
        step_size: ``auto`` (see :data:`.settings.AUTO`), or a length such as ``"2/255"``.
        start_size: half the width of the uniform random start; at least 1/255, see :class:`.trades.TradesSettings`.
        clean_weight: weight of the clean images in the loss (the paper: 1/6); 0 leaves their pass out.
        batch_norm: during attack generation (:data:`.settings.BATCH_NORM_MODES`); ``eval`` as in the paper's code.
    """

    method = "rslad"
    reads_labels = False
    needs_teacher = True

    teacher: str = path()
    teacher_sees: str = choice("augmented", ("augmented", "original"))
    steps: int = number(1, low=1, high=1000, integer=True)
    step_size: str | float = size(AUTO, words=(AUTO,))
    start_size: str | float = size("1/255", least=1 / 255)
    clean_weight: float = number(1 / 6, low=0, high=1)
    batch_norm: str = bn_mode("eval")


class Rslad(AdversarialTraining):
    """Attack generation against the teacher's soft labels, then one training step towards them. Labels are not used.

    Deviation from the paper's code: the divergence is summed over the classes and averaged over the batch; the code
    averages over the classes too, which divides the loss by their number.
    """

    settings: RsladSettings

    def __init__(self, context: MethodContext, settings: RsladSettings) -> None:
        super().__init__(context, settings)
        if context.teacher is None:
            raise UsageError("method 'rslad' learns from a teacher and got none; set rslad.teacher to a model file")
        self.teacher = context.teacher
        self._soft = torch.empty(0)

    @property
    def passes(self) -> str:
        """The attack passes, one or two training passes, and the teacher's."""
        count = int(self.settings.steps) + (2 if self.settings.clean_weight else 1)
        teacher = " + 1 teacher's forward" if self.teacher.passes else ""
        return f"{count} forward{teacher} + {count} backward passes"

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Ascent of the divergence from the soft labels of x, inside the ball and inside [0, 1]."""
        settings, epsilon, steps = self.settings, self.epsilon, int(self.settings.steps)
        soft = self._soft = self.teacher.logits(x, indices)
        step = self.step_size()
        start = uniform_start(x, epsilon=parse_epsilon(settings.start_size), generator=self.generator)
        x_adv = project(start, x, epsilon=epsilon)
        with attack_generation(self.model, settings.batch_norm):
            for _ in range(steps):
                gradient = input_gradient(self.model, x_adv, lambda logits: kl(logits, soft)).gradient
                x_adv = project(x_adv + step * gradient.sign(), x, epsilon=epsilon)
        return x_adv

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Both divergences from the soft labels of :meth:`perturb`; in train mode each with its own statistics."""
        weight = self.settings.clean_weight
        logits = self.model(x_adv)
        gap = kl(logits, self._soft).mean()
        if not weight:
            return LossOutput(gap, {"kl": gap.detach()}, logits.detach())
        clean = kl(self.model(x), self._soft).mean()
        terms = {"kl": gap.detach(), "clean_kl": clean.detach()}
        return LossOutput((1 - weight) * gap + weight * clean, terms, logits.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state and the teacher's digest."""
        return {**super().state_dict(), "teacher": self.teacher.digest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the generator's state.

        Raises:
            ModelFileError: the run began with another teacher.
        """
        if not torch.equal(state["teacher"].cpu(), self.teacher.digest):
            raise ModelFileError(
                f"{self.settings.teacher}: is not the teacher any more that the run began with; put that file back"
            )
        super().load_state_dict(state)
