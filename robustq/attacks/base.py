"""The base of all attacks: the model protocol, gradients, the attack state and its counts.

What an attack spends: forward passes and gradients, counted per image, whatever the attack.

    model = Counted(network, images=len(x))
    x_adv = apgd(model, x, y, epsilon=8 / 255)
    model.gradient_steps.sum()

An attack that goes on with some of its images says so by `asked_about`, which changes nothing for other models.

The gradient of an attack's loss with respect to the images, and the length of the steps along its sign.

The bookkeeping of attacks that stop at success: which images of a batch still stand, and the worst picture of each.

The convention is AutoAttack's (arXiv:2003.01690): an image that the model misclassifies without attack is left alone,
and one that broke is not attacked again, so that the cost falls as images fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from robustq.attacks.ball import check_epsilon
from robustq.attacks.losses import margin
from robustq.errors import UsageError

Answer = TypeVar("Answer")
Other = TypeVar("Other")


class Counted(Generic[Answer]):
    """A model that counts what it is asked; its answers and gradients are those of the model inside.

    A pass counts as a gradient step when autograd watches the images, which attacks let it do for nothing else.

    Args:
        model: images -> logits, or any other callable on images.
        images: N, how many images the attack is given.

    Attributes:
        queries: (N,) int64, forward passes without gradient.
        gradient_steps: (N,) int64, forward passes with gradient.
    """

    def __init__(self, model: Callable[[Tensor], Answer], *, images: int) -> None:
        self.model = model
        self.queries = torch.zeros(images, dtype=torch.int64)
        self.gradient_steps = torch.zeros(images, dtype=torch.int64)
        self._rows = torch.arange(images)

    def __call__(self, x: Tensor) -> Answer:
        """(n, C, H, W) -> the model's answer; n is N, or as many as `for_rows` named.

        Raises:
            UsageError: another number of images.
        """
        if len(x) != len(self._rows):
            raise UsageError(
                f"the model was asked about {len(x)} images and counts {len(self._rows)}; an attack that goes on with "
                "some of its images calls asked_about(model, rows)"
            )
        spent = self.gradient_steps if x.requires_grad and torch.is_grad_enabled() else self.queries
        spent[self._rows] += 1
        return self.model(x)

    def for_rows(self, rows: Tensor) -> Counted[Answer]:
        """The same counters, for some of the images: indices (n,) into those of this one, or a bool mask."""
        part = self.sharing(self.model)
        part._rows = self._rows[rows.cpu()]
        return part

    def sharing(self, model: Callable[[Tensor], Other]) -> Counted[Other]:
        """Another callable on the same counters, such as the same network's features."""
        other = Counted(model, images=0)
        other.queries, other.gradient_steps, other._rows = self.queries, self.gradient_steps, self._rows
        return other


def asked_about(model: Callable[[Tensor], Answer], rows: Tensor) -> Callable[[Tensor], Answer]:
    """The model to ask about these rows of the batch: counted as theirs where the model counts, else the model."""
    return model.for_rows(rows) if isinstance(model, Counted) else model


Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) float in [0, 1] -> logits (N, K) float. An nn.Module is one."""


class LossAndGradient(NamedTuple):
    """What one forward and backward pass tells an attack; all detached.

    gradient: (N, C, H, W), of the loss of each image with respect to that image.
    losses: (N,), one per image.
    logits: (N, K).
    """

    gradient: Tensor
    losses: Tensor
    logits: Tensor


def input_gradient(model: Model, x: Tensor, objective: Callable[[Tensor], Tensor]) -> LossAndGradient:
    """Differentiate `objective(model(x))` with respect to `x` only; works under `torch.no_grad` too.

    Parameters get no `.grad`. A NaN in the gradient becomes 0, that is no step there: it would turn the pixel into NaN,
    and a NaN image breaks every model without being an attack.

    Args:
        model: images -> logits, differentiable with respect to the images.
        x: (N, C, H, W) float.
        objective: logits (N, K) -> losses (N,), one per image.

    Raises:
        UsageError: the logits do not depend on the images for autograd, usually because the model runs outside PyTorch,
            under its own no_grad, or detaches its input. (A gradient that is merely zero is returned as it is.)
    """
    (slope,) = input_gradients(model, x, [objective])
    return slope


def input_gradients(
    model: Model, x: Tensor, objectives: Sequence[Callable[[Tensor], Tensor]]
) -> Iterator[LossAndGradient]:
    """The same for several objectives: one forward pass, and a backward pass for each as it is asked for.

    Args, result and errors are those of `input_gradient`.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = model(leaf)
    for number, objective in enumerate(objectives, 1):
        with torch.enable_grad():
            losses = objective(logits)
            total = losses.sum()
        gradient = None
        if total.requires_grad:
            goes_on = number < len(objectives)
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=goes_on)
        if gradient is None:
            raise UsageError(
                "the model gives logits without a gradient with respect to the images; attack its differentiable "
                "PyTorch form instead, and judge the images that this finds on the model itself"
            )
        yield LossAndGradient(torch.nan_to_num(gradient, nan=0.0), losses.detach(), logits.detach())


def step_length(step_size: float | None, *, epsilon: float, steps: int) -> float:
    """The step of an iterated attack, `epsilon / 4` if none is given; checks the three settings before any work.

    Raises:
        UsageError: epsilon outside [0, 1], a negative or NaN step, or fewer than one step.
    """
    check_epsilon(epsilon)
    if steps < 1:
        raise UsageError(f"steps is {steps}; an iterated attack takes at least 1")
    if step_size is None:
        return epsilon / 4
    if not 0.0 <= step_size <= 1.0:
        raise UsageError(f"step_size is {step_size}; give a number from 0 to 1, in the unit of the images, like 2/255")
    return step_size


Criterion = Callable[[Tensor, Tensor], Tensor]
"""(pictures (n, C, H, W), their rows in the batch (n,) int64) -> (n,) bool: whether each one counts as broken.

Asked only about pictures that the attacked model misclassifies. It lets the one who counts have the last word: an
evaluation counts rounded pictures, and on the deployed file. Without one the attacked model's own answer counts.
"""


class AttackState:
    """A batch under attack; asks the model once about the clean images.

    Args:
        model: images -> logits.
        x: (N, C, H, W) float in [0, 1].
        y: (N,) int64 labels.
        criterion: what counts as broken, where the model's own answer does not.
        stop: whether broken images leave the hunt.

    Attributes:
        x_adv: (N, C, H, W), per image a picture that broke it if there is one, and of these or else of all that were
            offered the one with the highest margin; the clean image itself counts as offered.
        broken: (N,) bool.
        standing: (n,) int64, the rows that are still to be attacked: all but the broken ones, and without `stop` all
            but those that were broken before the attack.
        clean_logits: (N, K).

    Raises:
        UsageError: a model with fewer than two classes, or without one row of logits per image.
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
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.broken = self._breaks(rows, self.x, self.clean_logits)
        self.standing = rows[~self.broken]

    @torch.no_grad()
    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Take note of pictures and the model's answers to them.

        Args:
            rows: (n,) int64, of the batch, each at most once.
            x_adv: (n, C, H, W), inside the ball.
            logits: (n, K), the model's answers to them.

        Returns:
            (n,) bool, the rows that the attack goes on with.
        """
        margins = _margins(logits, self.y[rows])
        breaks = self._breaks(rows, x_adv, logits)
        before = self.broken[rows]
        better = (breaks & ~before) | ((breaks == before) & (margins > self.margins[rows]))
        taken = rows[better]
        self.x_adv[taken] = x_adv[better]
        self.margins[taken] = margins[better]
        if not bool(breaks.any()) or not self.stop:
            self.broken[rows] = before | breaks
            return torch.ones_like(breaks)
        self.broken[rows] = before | breaks
        self.standing = self.standing[~self.broken[self.standing]]
        return ~breaks

    @torch.no_grad()
    def settle(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        """Offer pictures that are the attack's answer for images that stand, whatever their margins.

        Args:
            rows, x_adv, logits: as for `offer`.
        """
        stood = ~self.broken[rows]
        self.margins[rows[stood]] = -torch.inf
        self.offer(rows, x_adv, logits)

    def model_for(self, rows: Tensor) -> Model:
        """The model to ask about these rows."""
        return asked_about(self.model, rows)

    @torch.no_grad()
    def ask(self, rows: Tensor, pictures: Tensor) -> Tensor:
        """The model's answers (n, K) to pictures (n, C, H, W), without gradient and on the images' device.

        A judge outside PyTorch answers on the CPU, wherever the images are.
        """
        return self.model_for(rows)(pictures).to(self.x.device)

    def _breaks(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        wrong = misclassified(logits, self.y[rows])
        if self.criterion is None or not bool(wrong.any()):
            return wrong
        asked = wrong.clone()
        wrong[asked] = self.criterion(x_adv[asked], rows[asked]).to(wrong.device)
        return wrong


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: another class wins (the lowest of several equal ones does), or a logit is NaN.

    A model that answers NaN has not classified the image; the judge counts alike (`evaluation.accuracy.predict`).
    """
    return (logits.argmax(dim=1) != y) | logits.isnan().any(dim=1)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin, infinite for NaN logits and for infinite ones that cancel: nothing is worse for a model."""
    return torch.nan_to_num(margin(logits, y), nan=torch.inf)
