"""The base of all attacks: model protocol, input gradients, and the attack state.

AttackState follows AutoAttack (arXiv:2003.01690): images that the model misclassifies without attack are left alone,
and images that broke are not attacked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon
from robustq.attacks.counted import model_for
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import margin
from robustq.errors import UsageError, one_line

PerImage = TypeVar("PerImage")

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) float in [0, 1] -> logits (N, K) float. An nn.Module is one."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, K), their rows in the batch (n,) int64) -> losses (n,)."""


class LossAndGradient(NamedTuple):
    """One pass, detached: the gradient (N, C, H, W) of each image's loss, the losses (N,), and the logits (N, K)."""

    gradient: Tensor
    losses: Tensor
    logits: Tensor


def input_gradient(model: Model, x: Tensor, objective: Callable[[Tensor], Tensor]) -> LossAndGradient:
    """Differentiate `objective(model(x))` with respect to `x` only; works under `torch.no_grad` too.

    Parameters get no `.grad`. NaN in the gradient becomes 0 (no step): a NaN pixel would break every model. x is
    (N, C, H, W) float, and the objective maps logits (N, K) to one loss per image (N,).

    UsageError if the logits have no gradient with respect to the images, usually because the model runs outside
    PyTorch, under no_grad, or detaches its input. A gradient of zeros is returned as it is.
    """
    (result,) = input_gradients(model, x, [objective])
    return result


def input_gradients(
    model: Model, x: Tensor, objectives: Sequence[Callable[[Tensor], Tensor]]
) -> Iterator[LossAndGradient]:
    """`input_gradient` for several objectives: one forward pass, and one backward pass each."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = model(leaf)
    for number, objective in enumerate(objectives, 1):
        with torch.enable_grad():
            losses = objective(logits)
            total = losses.sum()
        gradient = None
        if total.requires_grad:
            retain = number < len(objectives)
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=retain)
        if gradient is None:
            raise UsageError(
                "the model gives logits without a gradient with respect to the images; attack its differentiable "
                "PyTorch form, and judge the adversarial images on the model itself"
            )
        yield LossAndGradient(torch.nan_to_num(gradient, nan=0.0), losses.detach(), logits.detach())


def lack_of_gradient(model: Model, x: Tensor) -> str | None:
    """Why a model gives no gradient with respect to images x (N, C, H, W); None if it gives one, also one of zeros."""
    leaf = x.detach().clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(leaf)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # code outside PyTorch refuses tensors that autograd records in its own ways
        return one_line(error, longest=120)
    if not logits.requires_grad or torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is None:
        return "its logits have no gradient with respect to the images"
    return None


def gradient_of_rows(model: Model, rows: Tensor, x: Tensor, objective: Objective) -> LossAndGradient:
    """`input_gradient` for images x (n, C, H, W) that are some rows (n,) of the batch."""
    return input_gradient(model_for(model, rows), x, lambda logits: objective(logits, rows))


def check_settings(*, epsilon: float, **counts: int) -> None:
    """Raise UsageError for epsilon outside [0, 1], or one of the counts (steps, restarts, queries ...) below 1."""
    check_epsilon(epsilon)
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; give at least 1")


LOOK_EVERY = 10
"""Steps between two looks at the broken images where the host waits for a look: on every device but the CPU."""


def left(kept: Tensor | None, number: int) -> Tensor | None:
    """The images that a loop goes on with after a step, as indices (m,) int64; None: all, or a look is not due.

    ``kept`` is the answer of `AttackState.record`, and ``number`` counts the steps.
    """
    if kept is None or (kept.device.type != "cpu" and number % LOOK_EVERY):
        return None
    indices = kept.nonzero()[:, 0]
    return None if len(indices) == len(kept) else indices


def select(images: PerImage, indices: Tensor | None) -> PerImage:
    """A dataclass of tensors with one entry per image, for some of the images: indices (m,) int64, None for all."""
    if indices is None:
        return images
    return type(images)(*(getattr(images, field.name)[indices] for field in fields(images)))  # type: ignore[arg-type]


def replace_rows(target: Tensor, rows: Tensor, values: Tensor, mask: Tensor) -> None:
    """target[rows] = values where mask (n,) is True, in place; rows (n,) int64, each at most once."""
    if target.device.type == "cpu":
        chosen = mask.nonzero()[:, 0]
        target[rows[chosen]] = values[chosen]
    else:  # a look at the mask would make the host wait
        target[rows] = torch.where(mask.reshape(-1, *(1 for _ in target.shape[1:])), values, target[rows])


Criterion = Callable[[Tensor, Tensor], Tensor]
"""(x_adv (n, C, H, W), their rows in the batch (n,) int64) -> (n,) bool: which of them count as broken.

It is called only with images that the attacked model misclassifies. An evaluation uses it to round the images and to
judge them on the deployed file.
"""


def none_breaks(x_adv: Tensor, rows: Tensor) -> Tensor:
    """The criterion by which no image counts as broken, so that each gets all steps."""
    return torch.zeros_like(rows, dtype=torch.bool)


class AttackState:
    """A batch under attack. Runs the model once, on the clean images.

    Args as in `robustq.attacks`; with `stop` broken images are dropped. UsageError for a model with fewer than two
    classes, or without one row of logits per image.

    Attributes:
        x_adv: (N, C, H, W), per image an adversarial image that broke, if there is one; of these, or else of all that
            were recorded (the clean image included), the one with the highest margin.
        broken: (N,) bool.
        clean_logits: (N, K).
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, x: Tensor, y: Tensor, *, criterion: Criterion | None = None, stop: bool = True
    ) -> None:
        self.model, self.x, self.y = model, x.detach(), y
        self.criterion, self.stop = criterion, stop
        self.clean_logits = model(self.x).to(x.device)
        if self.clean_logits.ndim != 2 or len(self.clean_logits) != len(x) or self.clean_logits.shape[1] < 2:
            raise UsageError(
                f"the model answered {len(x)} images with a tensor of shape {tuple(self.clean_logits.shape)}; attacks "
                "need logits (images, classes) of at least 2 classes"
            )
        rows = torch.arange(len(x), device=x.device)
        self.x_adv = self.x.clone()
        self.margins = _margins(self.clean_logits, y)
        self.broken = self._breaks(rows, self.x, self.clean_logits)
        self._right = rows[(~self.broken).nonzero()[:, 0]]

    @property
    def remaining(self) -> Tensor:
        """(n,) int64, the rows that are still attacked: without `stop` all rows that were right without attack.

        The host waits.
        """
        return self._right[(~self.broken[self._right]).nonzero()[:, 0]] if self.stop else self._right

    @torch.no_grad()
    def record(self, rows: Tensor, x_adv: Tensor, logits: Tensor, *, among: Tensor | None = None) -> Tensor | None:
        """Record adversarial images (n, C, H, W) inside the ball, and the model's answers to them, logits (n, K).

        ``rows`` are (n,) int64 of the batch, each at most once; ``among`` is (n,) bool, those that count (None: all).
        With `stop` broken images stay as they are. Returns (n,) bool, the rows to continue with, for `left`; None: all.
        The host waits only for a criterion.
        """
        margins = _margins(logits, self.y[rows])
        before = self.broken[rows]
        if self.stop:
            among = ~before if among is None else among & ~before
        breaks = self._breaks(rows, x_adv, logits, among=among)
        better = (breaks & ~before) | ((breaks == before) & (margins > self.margins[rows]))
        if among is not None:
            better = better & among
        replace_rows(self.x_adv, rows, x_adv, better)
        replace_rows(self.margins, rows, margins, better)
        broken = before | breaks
        self.broken[rows] = broken
        return ~broken if self.stop else None

    def drop(self, kept: Tensor | None, number: int, rows: Tensor) -> Tensor:
        """``rows`` without those that `left` drops."""
        indices = left(kept, number)
        return rows if indices is None else rows[indices]

    @torch.no_grad()
    def record_final(self, rows: Tensor, x_adv: Tensor) -> None:
        """Query the model with the final images, and keep them for images that are not broken, whatever the margins."""
        self.margins[rows] = torch.where(self.broken[rows], self.margins[rows], -torch.inf)
        self.record(rows, x_adv, self.query(rows, x_adv))

    @torch.no_grad()
    def query(self, rows: Tensor, images: Tensor) -> Tensor:
        """The model's logits (n, K) for images (n, C, H, W), without gradient, on the device of the images."""
        # A judge outside PyTorch answers on the CPU.
        return model_for(self.model, rows)(images).to(self.x.device)

    def _breaks(self, rows: Tensor, x_adv: Tensor, logits: Tensor, *, among: Tensor | None = None) -> Tensor:
        wrong = misclassified(logits, self.y[rows])
        if among is not None:
            wrong = wrong & among
        if self.criterion is none_breaks:
            return torch.zeros_like(wrong)  # without asking, for which the host would wait
        if self.criterion is not None:
            candidates = wrong.nonzero()[:, 0]
            if len(candidates):
                wrong[candidates] = self.criterion(x_adv[candidates], rows[candidates]).to(wrong.device)
        return wrong


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: another class wins (the lowest of equal ones does), or a logit is NaN (as in `accuracy.predict`)."""
    return (logits.argmax(dim=1) != y) | logits.isnan().any(dim=1)


def likely_targets(clean_logits: Tensor, y: Tensor, *, count: int, generators: ImageGenerators) -> list[Tensor]:
    """The classes of the highest logits (N, K) except the label's, highest first: up to `count` tensors (N,) int64.

    Each image has its own random order of classes with equal logits: where only the winner has a logit of its own, the
    classes of the lowest indices would be everybody's targets.
    """
    others = clean_logits.nan_to_num(nan=0.0).scatter(1, y[:, None], -torch.inf)
    shuffled = generators.child("ties").uniform((clean_logits.shape[1],)).argsort(dim=1, stable=True)
    order = shuffled.gather(1, others.gather(1, shuffled).sort(dim=1, descending=True, stable=True).indices)
    # The label is last unless another logit is -inf as well; the classes behind it move up by one place.
    label = (order == y[:, None]).to(torch.int8).argmax(dim=1, keepdim=True)
    place = torch.arange(order.shape[1] - 1, device=order.device)
    return list(order.gather(1, place + (place >= label).to(torch.int64))[:, :count].unbind(dim=1))


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin; NaN, also from infinite logits that cancel, is the worst for the model: infinite."""
    return torch.nan_to_num(margin(logits, y), nan=torch.inf)
