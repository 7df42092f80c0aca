"""What a training method is, and how it generates attacks.

How a method makes its adversarial images: what a crafting pass computes, the BatchNorm mode it runs in, and the
lengths it is given.

The words for the mode are those of ODG-Q's key ``batch_norm``. Published code differs: TRADES and RSLAD craft in eval
mode, the single-step methods in train mode, where the crafting pass moves the running statistics too; which is better
is a matter of tenths (Pang et al., arXiv:2010.00467, section 3.4, finds eval mode slightly ahead).

What the trainer asks of a training method: the images to train on, their loss, and a word on what a batch costs.

The loss stands apart from the images, so that it can be computed more than once on the same ones: weight perturbation
(AWP, arXiv:2004.05884) needs it at two places. For each batch the trainer calls, :attr:`Method.repeats` times over,

    x_adv = method.perturb(x, y, places)
    step = method.loss(x, x_adv, y, places)        (perhaps several times)
    step.loss.backward()                           (of the loss that the optimiser then steps on)
    method.after_backward(x_adv)

The state of a run is only taken between two batches, never between the repeats of one: they take the time of a few
natural steps, so a stop can wait for them, and neither the batch nor the count of its repeats has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.batch_norm import batch_statistics, running_statistics
from robustq.recipe import parse_epsilon
from robustq.recipe.schema import shown, unknown_value

MODES = ("eval", "train", "separate")
"""``eval``: the running statistics, which stay as they are; ``train``: those of the crafted batch, which move the
running ones; ``separate``: those of the crafted batch, which move nothing."""

AUTO = "auto"
"""A step of min(1, 2.5 / steps) epsilon."""


@contextmanager
def crafting(model: nn.Module, mode: str) -> Iterator[None]:
    """Within it ``model`` normalises as ``mode`` says, and nothing but its input gets a gradient.

    Args:
        model: in train mode, which is what the mode ``train`` means.
        mode: one of :data:`MODES`.
    """
    with normalised(model, mode), only_input_gradients(model):
        yield


def normalised(model: nn.Module, mode: str) -> AbstractContextManager[None]:
    """Within it ``model`` normalises as ``mode`` (one of :data:`MODES`) says; ``train`` expects it in train mode."""
    if mode == "eval":
        return running_statistics(model)
    return batch_statistics(model) if mode == "separate" else nullcontext()


@contextmanager
def only_input_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no weight asks for a gradient: a pass for the input's costs no sum over activations and keeps none of
    them for the weights' sake.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def mode_errors(key: str, mode: str) -> list[str]:
    """What is wrong with a BatchNorm mode, in words: nothing, or one fault."""
    return [] if mode in MODES else [unknown_value(key, mode, MODES)]


def step_length(step_size: str | float, *, epsilon: float, steps: int) -> float:
    """A step in the unit of the images.

    Args:
        step_size: :data:`AUTO`, or the length itself as :func:`length` takes it. 2.5 epsilon / steps lets the steps
            reach the other side of the ball (arXiv:1706.06083, section 5); it is 2/255 for ten steps at 8/255, as is
            usual. For fewer than three steps it would exceed the ball and is epsilon.
        epsilon: radius.
        steps: how many.
    """
    return min(1.0, 2.5 / steps) * epsilon if step_size == AUTO else length(step_size)


def length(value: str | float) -> float:
    """A length in [0, 1] from a number or from text such as ``2/255``.

    Raises:
        UsageError: it is neither.
    """
    return parse_epsilon(value)


def length_errors(key: str, value: str | float, *, words: tuple[str, ...] = (), least: float = 0.0) -> list[str]:
    """What is wrong with a length of a method's table, in words: nothing, or one fault.

    Args:
        key, value: as in the recipe, the table's name included.
        words: what may stand in place of a length.
        least: the smallest one; 0 itself is refused.
    """
    if value in words:
        return []
    named = "".join(f"'{word}' or " for word in words)
    try:
        found = length(value)
    except UsageError:
        return [f"{key} = {shown(value)} is not {named}a number from 0 to 1, such as 2/255"]
    # What float32 images cannot tell from the least length is that length.
    if found == 0.0 or found < least - 1e-7:
        wanted = f"at least {round(least * 255)}/255" if least else "over 0"
        return [f"{key} = {shown(value)} must be {named}{wanted}"]
    return []


@dataclass(frozen=True)
class CrossEntropy:
    """The task loss of a run: one object for every method, so that its options reach them all.

    Args:
        label_smoothing: s in [0, 1): the label's share becomes 1 - s + s/K of K classes, every other class's s/K
            (Szegedy et al., arXiv:1512.00567, section 7).
    """

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch: logits (B, K), labels (B,) int64 -> scalar with gradient."""
        return functional.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


PLAIN_CROSS_ENTROPY = CrossEntropy()
"""Without options."""


@dataclass(frozen=True)
class Step:
    """The outcome of one computation of the loss.

    Args:
        loss: scalar to minimise, with gradient.
        terms: its parts before weighting, detached, by name (for metrics.jsonl).
        logits: (B, K) of the images that the weights are trained on, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


def task_step(model: nn.Module, x_adv: Tensor, y: Tensor, *, cross_entropy: CrossEntropy) -> Step:
    """The plain loss of many methods: cross-entropy of the images that were made, and nothing else."""
    logits = model(x_adv)
    loss = cross_entropy(logits, y)
    return Step(loss, {"cross_entropy": loss.detach()}, logits.detach())


class Method(Protocol):
    """A training method; it may keep state from batch to batch."""

    @property
    def passes(self) -> str:
        """Cost of one batch, all its repeats together, for people: ``3 forward + 2 backward passes``."""

    @property
    def adversarial(self) -> bool:
        """Whether best.pt is chosen by robust accuracy on the held-out images (else by clean accuracy)."""

    @property
    def repeats(self) -> int:
        """How many steps of the optimiser are taken on each batch, at least 1."""

    def begin_epoch(self, epoch: int) -> None:
        """Told before the first batch of each epoch, counted from 0."""

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """The images that the weights are trained on; may move the method's own state.

        Args:
            x: (B, C, H, W) float32 in [0, 1]; a short last batch has fewer images.
            y: (B,) int64 labels.
            places: (B,) int64 positions of the images in the training split.

        Returns:
            (B, C, H, W) in [0, 1], without gradient: ``x`` itself where nothing is perturbed; a leaf that requires
            gradient where :meth:`after_backward` is to find it.
        """

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        """The loss of the batch that :meth:`perturb` gave ``x_adv`` for, differentiable in the weights.

        It leaves the method's state alone, so that it may be called again at other weights; in train mode the running
        statistics of BatchNorm move with every call. Arguments as :meth:`perturb`.
        """

    def after_backward(self, x_adv: Tensor) -> None:
        """Told once per repeat, when ``x_adv.grad`` holds the gradient of the loss that the optimiser steps on (where
        :meth:`perturb` returned a leaf that requires it); before the optimiser's step.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the method carries from batch to batch, random generators included: with the weights and the
        optimiser's state it must be all that the next batch depends on, or a resumed run would be another run.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave; in mid-epoch no :meth:`begin_epoch` follows."""


class Stateless:
    """The parts of a :class:`Method` that most leave alone: one step a batch, nothing carried between batches."""

    repeats = 1

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes between epochs."""

    def after_backward(self, x_adv: Tensor) -> None:
        """The gradient of the images is not needed."""

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


class Drawing(Stateless):
    """As :class:`Stateless`, but for the random numbers that it draws.

    Args:
        generator: on the CPU, so that the draws do not depend on the device.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Tensor]:
        """Where the generator stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put it back there."""
        self.generator.set_state(state["generator"].cpu())


Settings = TypeVar("Settings")


class AdversarialTraining(Drawing, Generic[Settings]):
    """A method that crafts images inside the ball and draws random numbers for that.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        settings: the method's own table of a recipe.
        epsilon: radius of the threat model, in [0, 1].
        generator: CPU generator of what the method draws.
        cross_entropy: the task loss; crafting ascends it without label smoothing.
    """

    adversarial = True

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        epsilon: float,
        generator: torch.Generator,
        cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY,
    ) -> None:
        super().__init__(generator)
        self.model = model
        self.settings = settings
        self.epsilon = epsilon
        self.cross_entropy = cross_entropy
