"""Training methods: the base class, as the trainer calls it.

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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustq.attacks.generators import draw_generator
from robustq.hardening.methods.settings import AUTO
from robustq.models.batch_norm import batch_statistics, running_statistics
from robustq.recipe import parse_epsilon


@contextmanager
def attack_generation(model: nn.Module, mode: str) -> Iterator[None]:
    """Set BatchNorm to ``mode`` (one of :data:`.settings.BATCH_NORM_MODES`) and compute gradients of the images only.

    ``model`` must be in train mode.
    """
    with batch_norm_mode(model, mode), only_input_gradients(model):
        yield


def batch_norm_mode(model: nn.Module, mode: str) -> AbstractContextManager[None]:
    """Set BatchNorm to ``mode`` (one of :data:`.settings.BATCH_NORM_MODES`); ``model`` must be in train mode."""
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


@dataclass(frozen=True)
class LossOutput:
    """The result of one computation of the loss."""

    loss: Tensor  # scalar to minimise, with gradient
    terms: dict[str, Tensor]  # its parts before weighting, detached, by name (for metrics.jsonl)
    logits: Tensor  # (B, K) of the images that the weights are trained on, detached

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
    """What a method gets beside its settings."""

    model: nn.Module  # in train mode: images in [0, 1] -> logits
    epsilon: float  # radius of the threat model, in [0, 1]
    batch_size: int  # images of a full batch
    image_shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    samples: int  # training images
    epochs: int  # of the whole run
    device: torch.device
    generator: torch.Generator  # of the CPU; seeds the method's draws on another device
    cross_entropy: nn.CrossEntropyLoss
    """The task loss of all methods: mean over the batch of logits (B, K) and labels (B,) int64. With label smoothing s
    the target of the label is 1 - s + s/K, that of every other class s/K (arXiv:1512.00567, section 7).
    """
    teacher: Teacher | None = None  # of methods that need one


class Method:
    """A training method. This base trains on clean images with cross-entropy and has no state between batches."""

    adversarial: bool = False
    """Whether best.pt is chosen by robust accuracy on the held-out images (else by clean accuracy)."""

    repeats: int = 1
    """Optimizer steps on each batch."""

    carried: tuple[str, ...] = ()
    """Names of the tensors that the method keeps between batches; their shapes do not change."""

    settings: Any

    def __init__(self, context: MethodContext, settings: Any) -> None:
        self.model = context.model
        self.settings = settings
        self.epsilon = context.epsilon
        self.cross_entropy = context.cross_entropy
        self.generator = context.generator

    @property
    def passes(self) -> str:
        """Cost of one batch with all its repeats, for the log: ``3 forward + 2 backward passes``."""
        return "1 forward + 1 backward pass"

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
        return x

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """The loss of the batch whose ``x_adv`` :meth:`perturb` returned, differentiable in the weights.

        It does not change the method's state, so it may be called again at other weights. In train mode each call
        updates BatchNorm's running statistics.
        """
        logits = self.model(x_adv)
        return LossOutput.of(self.cross_entropy(logits, y), logits)

    def after_backward(self, x_adv: Tensor) -> None:
        """Called once per repeat after the backward pass and before the optimizer's step; ``x_adv.grad`` is set if
        :meth:`perturb` returned a leaf that requires gradient.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that the method keeps between batches, including random generators: what a resumed run needs."""
        return {name: getattr(self, name) for name in self.carried}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`begin_epoch` is not called again in mid-epoch."""
        for name in self.carried:
            getattr(self, name).copy_(state[name])


class AdversarialTraining(Method):
    """A method that generates adversarial images with random numbers and trains on them.

    Attack generation ascends plain cross-entropy, without label smoothing, unless the method says otherwise.
    """

    adversarial = True

    @property
    def passes(self) -> str:
        """One attack pass and the training pass."""
        return "2 forward + 2 backward passes"

    def generate(self, attack: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """The images of an ``attack`` of :mod:`robustq.attacks`, with the settings' BatchNorm mode."""
        with attack_generation(self.model, self.settings.batch_norm):
            return attack(self.model, x, y, epsilon=self.epsilon, generator=self.generator, **options)

    def step_size(self) -> float:
        """``step_size`` of the settings, for their number of ``steps``, in the unit of the images."""
        size, steps = self.settings.step_size, int(self.settings.steps)
        return min(1.0, 2.5 / steps) * self.epsilon if size == AUTO else parse_epsilon(size)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Float32 random numbers in [0, 1) on the device of a tensor."""
        return torch.rand(shape, generator=draw_generator(self.generator, like.device), device=like.device)

    def signs(self, *shape: int, like: Tensor) -> Tensor:
        """Random -1 and +1, with the type and device of a tensor."""
        generator = draw_generator(self.generator, like.device)
        coins = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=like.device)
        return (2 * coins - 1).to(like)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator and the tensors."""
        return {"generator": self.generator.get_state(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
