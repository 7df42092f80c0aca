"""A tiny network and data set, and what a training needs beside them."""

from __future__ import annotations

import io
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustq.data import Augment, TensorSplit
from robustq.hardening.methods.method import Method, MethodContext
from robustq.hardening.methods.natural import Natural, NaturalSettings
from robustq.hardening.methods.registry import build_method
from robustq.hardening.metrics import MACHINE_KEYS
from robustq.hardening.monitor import HoldoutAccuracy, Inspection, Monitor
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import Recipe

CPU = torch.device("cpu")
EPSILON = 0.1
IMAGES, BATCH = 40, 16  # batches of 16, 16 and 8


def spec(bits: int) -> ModelSpec:
    return ModelSpec("resnet8", bits, bits, 10, 1, 8, "digits", EPSILON, tuple("0123456789"))


def network(bits: int = 32) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(spec(bits))
    calibrate(model, split().images.float() / 255, from_scratch=True)
    # The trainer's memory format: sums in another order differ in their last bits.
    return model.to(memory_format=torch.channels_last)


def split(seed: int = 5) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(0, 10, (IMAGES,), generator=generator))


def recipe(method: str = "natural", **keys: Any) -> Recipe:
    return Recipe(name="test", method=method, **{"epochs": 2, "batch_size": BATCH, "lr": 0.1, **keys})


def build(recipe: Recipe, model: nn.Module, **keys: Any) -> Any:
    random: dict[str, Any] = {"generator": torch.Generator().manual_seed(keys.pop("seed", 3))}
    task = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    common: dict[str, Any] = {"batch_size": recipe.batch_size, "cross_entropy": task, **random}
    return build_method(recipe, context(model, **{**common, **keys}))


def context(model: nn.Module, **keys: Any) -> MethodContext:
    common: dict[str, Any] = {"epsilon": EPSILON, "batch_size": BATCH, "image_shape": (1, 8, 8), "samples": IMAGES}
    common |= {"classes": 10, "epochs": 2}
    random: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "cross_entropy": nn.CrossEntropyLoss()}
    return MethodContext(model=model, **{**common, **random, "device": CPU, **keys})


def natural(model: nn.Module, kind: type[Natural] = Natural, *, label_smoothing: float = 0.0) -> Any:
    return kind(context(model, cross_entropy=nn.CrossEntropyLoss(label_smoothing=label_smoothing)), NaturalSettings())


class ScriptedMonitor:
    """Returns prepared accuracies, and records the weights that it is asked about."""

    images = 500
    chance = 0.1

    def __init__(self, *answers: HoldoutAccuracy) -> None:
        self._answers = list(answers)
        self.weights: list[dict[str, Tensor]] = []

    def evaluate(self, model: nn.Module) -> HoldoutAccuracy:
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return self._answers.pop(0) if self._answers else HoldoutAccuracy(0.5, None)

    def inspect(self, model: nn.Module, *, batch_size: int) -> Inspection:
        return Inspection(1.0, 2.0, 3.0, 0.25)


class MemoryCheckpointer:
    """Keeps the last state as bytes."""

    def __init__(self) -> None:
        self.bytes = b""
        self.saved: list[tuple[int, int, bool, bool]] = []
        """(finished epochs, steps since, epoch_ended, is_best) of each save."""

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        self.bytes = file.getvalue()
        self.saved.append((state["standing"]["epoch"], state["standing"]["step"], epoch_ended, is_best))

    def load(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(io.BytesIO(self.bytes), weights_only=True)
        return state


def training(
    model: nn.Module,
    settings: Recipe,
    *,
    method: Any = None,
    data: TensorSplit | None = None,
    monitor: Any = None,
    augment: Augment | None = None,
    seed: int = 7,
) -> Training:
    method = method or natural(model, label_smoothing=settings.label_smoothing)
    watching = cast(Monitor, monitor or ScriptedMonitor())
    return Training(
        model,
        cast(Method, method),
        data or split(),
        watching,
        settings,
        augment=augment or Augment(),
        seed=seed,
        device=CPU,
    )


def begin(training: Training) -> MemoryCheckpointer:
    """A checkpointer that holds the training's state, as a run folder does from its beginning."""
    checkpointer = MemoryCheckpointer()
    checkpointer.save(training.state_dict(), epoch_ended=False, is_best=False)
    return checkpointer


def finish(training: Training) -> MemoryCheckpointer:
    """Train to the end."""
    checkpointer = begin(training)
    training.run(checkpointer, StopRequest())
    return checkpointer


def same(first: Any, second: Any, at: str = "state") -> None:
    """Assert that both are equal bit for bit, all the way down, but for times and memory."""
    assert type(first) is type(second), at
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype, at
        assert torch.equal(first, second), at
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for key in first:
            if key not in (*MACHINE_KEYS, "epoch_seconds", "loading_seconds"):
                same(first[key], second[key], f"{at}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), at
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{at}[{number}]")
    else:
        assert first == second, at
