"""Training methods: the protocol that the trainer calls, a base class, and checks of their settings.

For each batch the trainer does, :attr:`Method.repeats` times::

    x_adv = method.perturb(x, y, indices)
    output = method.loss(x, x_adv, y, indices)
    output.loss.backward()
    method.after_backward(x_adv)

Images and loss are separate because adversarial weight perturbation (arXiv:2004.05884) computes the loss twice on the
same images. A run is saved between batches, never between the repeats of one batch.

During attack generation BatchNorm has one of three modes. Published code differs: TRADES and RSLAD use eval mode, the
single-step methods train mode, which also moves the running statistics. The choice matters by a few tenths of a percent
(Pang et al., arXiv:2010.00467, section 3.4, finds eval mode slightly ahead).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import RecipeError, UsageError
from robustq.models.batch_norm import batch_statistics, running_statistics
from robustq.recipe import parse_epsilon
from robustq.recipe.schema import shown, unknown_value

BATCH_NORM_MODES = ("eval", "train", "separate")
"""``eval``: the running statistics, unchanged; ``train``: the batch's statistics, which update the running ones;
``separate``: the batch's statistics, running ones unchanged."""

AUTO = "auto"
"""A step of min(1, 2.5 / steps) epsilon."""


@contextmanager
def attack_generation(model: nn.Module, mode: str) -> Iterator[None]:
    """Set BatchNorm to ``mode`` (one of :data:`BATCH_NORM_MODES`) and compute gradients of the images only.

    ``model`` must be in train mode.
    """
    with batch_norm_mode(model, mode), only_input_gradients(model):
        yield


def batch_norm_mode(model: nn.Module, mode: str) -> AbstractContextManager[None]:
    """Set BatchNorm to ``mode`` (one of :data:`BATCH_NORM_MODES`); ``model`` must be in train mode."""
    if mode == "eval":
        return running_statistics(model)
    return batch_statistics(model) if mode == "separate" else nullcontext()


@contextmanager
def only_input_gradients(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of the weights: saves their computation and the activations kept for it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def training_step_size(step_size: str | float, *, epsilon: float, steps: int) -> float:
    """The step size in the unit of the images.

    Args:
        step_size: a length in [0, 1], or :data:`AUTO`: 2.5 epsilon / steps reaches the other side of the ball
            (arXiv:1706.06083, section 5). It is limited to epsilon, which matters below three steps.
        epsilon: radius.
        steps: number of steps.
    """
    return min(1.0, 2.5 / steps) * epsilon if step_size == AUTO else parse_epsilon(step_size)


def raise_errors(*errors: list[str]) -> None:
    """Raise one RecipeError with all ``errors``, if there are any."""
    if found := [error for some in errors for error in some]:
        raise RecipeError("; ".join(found))


def batch_norm_errors(key: str, mode: str) -> list[str]:
    """Validation errors of a BatchNorm mode: none or one."""
    return [] if mode in BATCH_NORM_MODES else [unknown_value(key, mode, BATCH_NORM_MODES)]


def size_errors(key: str, value: str | float, *, words: tuple[str, ...] = (), least: float = 0.0) -> list[str]:
    """Validation errors of a length such as ``2/255``: none or one.

    Args:
        key, value: as in the recipe, with the table's name.
        words: accepted in place of a length.
        least: smallest length; 0 itself is refused.
    """
    if value in words:
        return []
    alternatives = "".join(f"'{word}' or " for word in words)
    try:
        found = parse_epsilon(value)
    except UsageError:
        return [f"{key} = {shown(value)} is not {alternatives}a number from 0 to 1, such as 2/255"]
    # 1e-7: float32 images cannot resolve less.
    if found == 0.0 or found < least - 1e-7:
        wanted = f"at least {round(least * 255)}/255" if least else "over 0"
        return [f"{key} = {shown(value)} must be {alternatives}{wanted}"]
    return []


@dataclass(frozen=True)
class CrossEntropy:
    """The task loss of a run, shared by all methods.

    Args:
        label_smoothing: s in [0, 1): the target of the label is 1 - s + s/K of K classes, of every other class s/K
            (Szegedy et al., arXiv:1512.00567, section 7).
    """

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch: logits (B, K), labels (B,) int64 -> scalar with gradient."""
        return functional.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class LossOutput:
    """The result of one computation of the loss.

    Args:
        loss: scalar to minimise, with gradient.
        terms: its parts before weighting, detached, by name (for metrics.jsonl).
        logits: (B, K) of the images that the weights are trained on, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor

    @classmethod
    def of(cls, task: Tensor, logits: Tensor, *, weight: float = 0.0, **term: Tensor) -> LossOutput:
        """The cross-entropy ``task``, plus ``weight`` times at most one further named ``term``."""
        loss = task
        for value in term.values():
            loss = loss + weight * value
        terms = {"cross_entropy": task, **term}
        return cls(loss, {name: value.detach() for name, value in terms.items()}, logits.detach())


class Teacher(Protocol):
    """Gives soft labels."""

    @property
    def passes(self) -> int:
        """Forward passes of the teacher for each batch."""

    @property
    def digest(self) -> Tensor:
        """(32,) uint8, on the CPU: hash of the teacher's weights and kind, checked when a run is resumed."""

    def logits(self, x: Tensor, indices: Tensor) -> Tensor:
        """Logits (B, K), without gradient, of the augmented training images x (B, C, H, W) with ``indices`` (B,)."""


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """What a method gets beside its settings.

    Args:
        model: network in train mode, images in [0, 1] -> logits.
        epsilon: radius of the threat model, in [0, 1].
        batch_size: images of a full batch.
        image_shape: (C, H, W).
        samples: number of training images.
        device: where training runs.
        generator: of the method's random draws; on the CPU, so that they do not depend on the device.
        cross_entropy: the task loss.
        teacher: only for ``rslad``.
    """

    model: nn.Module
    epsilon: float
    batch_size: int
    image_shape: tuple[int, int, int]
    samples: int
    device: torch.device
    generator: torch.Generator
    cross_entropy: CrossEntropy
    teacher: Teacher | None = None


class Method(Protocol):
    """A training method; it may keep state from batch to batch."""

    @property
    def passes(self) -> str:
        """Cost of one batch with all its repeats, for the log: ``3 forward + 2 backward passes``."""

    @property
    def adversarial(self) -> bool:
        """Whether best.pt is chosen by robust accuracy on the held-out images (else by clean accuracy)."""

    @property
    def repeats(self) -> int:
        """Optimizer steps on each batch, at least 1."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first batch of each epoch, counted from 0."""

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """The images that the weights are trained on; may change the method's state.

        Args:
            x: (B, C, H, W) float32 in [0, 1]; the last batch may have fewer images.
            y: (B,) int64 labels.
            indices: (B,) int64 indices of the images in the training split.

        Returns:
            (B, C, H, W) in [0, 1], without gradient: ``x`` itself if nothing is perturbed; a leaf that requires
            gradient if :meth:`after_backward` needs it.
        """

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """The loss of the batch whose ``x_adv`` :meth:`perturb` returned, differentiable in the weights.

        It does not change the method's state, so it may be called again at other weights. In train mode each call
        updates BatchNorm's running statistics.
        """

    def after_backward(self, x_adv: Tensor) -> None:
        """Called once per repeat after the backward pass and before the optimizer's step; ``x_adv.grad`` is set if
        :meth:`perturb` returned a leaf that requires gradient.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that the method keeps between batches, including random generators: what a resumed run needs."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`begin_epoch` is not called again in mid-epoch."""


Settings = TypeVar("Settings")


class BaseMethod(Generic[Settings]):
    """Cross-entropy of clean images, without state; a :class:`Method` overrides what differs.

    Args:
        context: network, data and random numbers.
        settings: the method's own table of a recipe.
    """

    adversarial = False
    repeats = 1

    def __init__(self, context: MethodContext, settings: Settings) -> None:
        self.model = context.model
        self.settings = settings
        self.epsilon = context.epsilon
        self.cross_entropy = context.cross_entropy
        self.generator = context.generator

    @property
    def passes(self) -> str:
        """See :attr:`Method.passes`."""
        return "1 forward + 1 backward pass"

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes between epochs."""

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """The clean images."""
        return x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Cross-entropy of x_adv."""
        logits = self.model(x_adv)
        return LossOutput.of(self.cross_entropy(logits, y), logits)

    def after_backward(self, x_adv: Tensor) -> None:
        """The gradient of the images is not needed."""

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


class AdversarialTraining(BaseMethod[Settings]):
    """A method that generates adversarial images with random numbers and trains on them.

    Attack generation ascends plain cross-entropy, without label smoothing, unless the method says otherwise.
    """

    adversarial = True

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the generator's state."""
        self.generator.set_state(state["generator"].cpu())


@dataclass(frozen=True)
class MethodEntry:
    """A method as the registry finds it, in the constant ``METHOD`` of its module.

    Args:
        name: in a recipe.
        settings: dataclass of its own table in a recipe.
        build: makes the method from context and settings; None for a method that does not train.
    """

    name: str
    settings: type
    build: Callable[[MethodContext, Any], Method] | None
