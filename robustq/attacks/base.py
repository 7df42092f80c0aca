"""The base of all attacks: model protocol, query and gradient counts, input gradients, and the attack state.

AttackState follows AutoAttack (arXiv:2003.01690): images that the model misclassifies without attack are left alone,
and images that broke are not attacked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.losses import margin
from robustq.errors import UsageError, one_line

Answer = TypeVar("Answer")
Other = TypeVar("Other")
PerImage = TypeVar("PerImage")

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) float in [0, 1] -> logits (N, K) float. An nn.Module is one."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, K), their rows in the batch (n,) int64) -> losses (n,)."""


class Counted(Generic[Answer]):
    """A model that counts its queries and gradients per image; its answers are those of the model inside.

        model = Counted(network, images=len(x))
        x_adv = apgd(model, x, y, epsilon=8 / 255)
        model.gradient_steps.sum()

    The model may be any callable on images, and ``images`` is their number N. A pass counts as a gradient step when
    autograd watches the images.

    Attributes:
        queries, gradient_steps: (N,) int64, forward passes without and with gradient.
    """

    def __init__(self, model: Callable[[Tensor], Answer], *, images: int) -> None:
        self.model = model
        self.queries = torch.zeros(images, dtype=torch.int64)
        self.gradient_steps = torch.zeros(images, dtype=torch.int64)
        self._rows = torch.arange(images)

    def __call__(self, x: Tensor) -> Answer:
        """(n, C, H, W) -> the model's answer; UsageError unless n is N, or the number of rows given to `for_rows`."""
        if len(x) != len(self._rows):
            raise UsageError(
                f"the model got {len(x)} images and counts {len(self._rows)}; an attack that drops images from its "
                "batch calls model_for(model, rows)"
            )
        counts = self.gradient_steps if x.requires_grad and torch.is_grad_enabled() else self.queries
        counts[self._rows] += 1
        return self.model(x)

    def for_rows(self, rows: Tensor) -> Counted[Answer]:
        """The same counters for some of the images: rows (n,) int64 of this one's, or a bool mask."""
        part = self.sharing(self.model)
        part._rows = self._rows[rows.cpu()]
        return part

    def sharing(self, model: Callable[[Tensor], Other]) -> Counted[Other]:
        """Another callable with the same counters, such as the features of the same network."""
        other = Counted(model, images=0)
        other.queries, other.gradient_steps, other._rows = self.queries, self.gradient_steps, self._rows
        return other


def model_for(model: Callable[[Tensor], Answer], rows: Tensor) -> Callable[[Tensor], Answer]:
    """The model for these rows of the batch: a `Counted` counts them as theirs, other models stay as they are."""
    return model.for_rows(rows) if isinstance(model, Counted) else model


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


def select(images: PerImage, mask: Tensor) -> PerImage:
    """A dataclass of tensors with one entry per image, for some of the images: mask (n,) bool."""
    if bool(mask.all()):
        return images
    return type(images)(*(getattr(images, field.name)[mask] for field in fields(images)))  # type: ignore[arg-type]


Criterion = Callable[[Tensor, Tensor], Tensor]
"""(x_adv (n, C, H, W), their rows in the batch (n,) int64) -> (n,) bool: which of them count as broken.

It is called only with images that the attacked model misclassifies. An evaluation uses it to round the images and to
judge them on the deployed file.
"""


class AttackState:
    """A batch under attack. Runs the model once, on the clean images.

    Args as in `robustq.attacks`; with `stop` broken images are dropped. UsageError for a model with fewer than two
    classes, or without one row of logits per image.

    Attributes:
        x_adv: (N, C, H, W), per image an adversarial image that broke, if there is one; of these, or else of all that
            were recorded (the clean image included), the one with the highest margin.
        broken: (N,) bool.
        remaining: (n,) int64, the rows that are still attacked: without `stop` all rows that were right without attack.
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
        self.remaining = rows[~self.broken]

    @torch.no_grad()
    def record(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Record adversarial images (n, C, H, W) inside the ball, and the model's answers to them, logits (n, K).

        ``rows`` are (n,) int64 of the batch, each at most once. Returns (n,) bool, the rows to continue with.
        """
        margins = _margins(logits, self.y[rows])
        breaks = self._breaks(rows, x_adv, logits)
        before = self.broken[rows]
        better = (breaks & ~before) | ((breaks == before) & (margins > self.margins[rows]))
        self.x_adv[rows[better]] = x_adv[better]
        self.margins[rows[better]] = margins[better]
        self.broken[rows] = before | breaks
        if not self.stop or not bool(breaks.any()):
            return torch.ones_like(breaks)
        self.remaining = self.remaining[~self.broken[self.remaining]]
        return ~breaks

    @torch.no_grad()
    def record_final(self, rows: Tensor, x_adv: Tensor) -> None:
        """Query the model with the final images, and keep them for images that are not broken, whatever the margins."""
        self.margins[rows[~self.broken[rows]]] = -torch.inf
        self.record(rows, x_adv, self.query(rows, x_adv))

    @torch.no_grad()
    def query(self, rows: Tensor, images: Tensor) -> Tensor:
        """The model's logits (n, K) for images (n, C, H, W), without gradient, on the device of the images."""
        # A judge outside PyTorch answers on the CPU.
        return model_for(self.model, rows)(images).to(self.x.device)

    def _breaks(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        wrong = misclassified(logits, self.y[rows])
        if self.criterion is not None and bool(wrong.any()):
            candidates = wrong.clone()
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
    shuffled = generators.child("ties").uniform((clean_logits.shape[1],)).argsort(dim=1, stable=True).to(y.device)
    order = shuffled.gather(1, others.gather(1, shuffled).sort(dim=1, descending=True, stable=True).indices)
    # The label is last unless another logit is -inf as well.
    return list(order[order != y[:, None]].view(len(y), -1)[:, :count].unbind(dim=1))


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin; NaN, also from infinite logits that cancel, is the worst for the model: infinite."""
    return torch.nan_to_num(margin(logits, y), nan=torch.inf)
