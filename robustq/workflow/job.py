"""Inputs and result of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from robustq.data import Augment, Dataset
from robustq.evaluation.accuracy import constant_accuracy, wilson_interval
from robustq.hardening.methods.registry import resolved_settings
from robustq.hardening.monitor import Collapse
from robustq.hardening.run_folder import RUNS
from robustq.models.spec import ModelSpec
from robustq.recipe import Recipe
from robustq.seals import sha256
from robustq.workflow import Result
from robustq.workflow.setup import versions


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of a run, checked and loaded."""

    spec: ModelSpec
    data: Dataset
    recipe: Recipe
    seed: int  # of order, augmentation and the method's draws
    device: torch.device
    out: Path | None  # run folder, checked to be free; None: ``runs/<label>-<method>``
    source: Path | None  # the model file that is fine-tuned; None: from scratch
    foreign: bool = False  # whether that file is a state dict of another program
    float_accuracy: float | None = None  # of the float network in that file, on held-out images

    @property
    def default_folder(self) -> Path:
        """The run folder without ``out``."""
        return RUNS / f"{self.spec.label}-{self.recipe.method}"

    def config(self, augment: Augment | None = None) -> dict[str, Any]:
        """The content of config.json."""
        source, data = self.source, self.data
        return {
            "command": "train" if source is None else "harden",
            "recipe": {**self.recipe.to_dict(), "settings": resolved_settings(self.recipe)},
            "source": None if source is None else self._source(source),
            "spec": self.spec.to_dict(),
            "data": {"name": data.name, "digest": data.digest(), "skip_bad_images": data.skip_bad_images},
            **({} if augment is None else {"augment": asdict(augment)}),
            "seed": self.seed,
            "device": str(self.device),
            "versions": versions(),
        }

    def _source(self, path: Path) -> dict[str, Any]:
        origin = {"path": str(path.absolute()), "sha256": sha256(path), "float_accuracy": self.float_accuracy}
        return {**origin, "foreign": True} if self.foreign else origin


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainResult(Result):
    """Result of train and harden, and the content of result.json.

    Accuracies of the hold-out are those of the best epoch; None: not measured.
    """

    OPTIONAL = ("seconds", "float_holdout_accuracy", "foreign", "bits", "method")

    checkpoint: Path  # the best epoch's model file, in the run folder
    run: Path
    model: str  # label of the network, such as ``resnet20-w4a4``
    recipe: str
    clean_accuracy: float  # on the test images
    clean_interval: tuple[float, float]  # 95%
    test_images: int
    chance: float  # accuracy of one class for every test image
    near_chance: bool  # whether the interval of the accuracy reaches down to that
    epochs: int  # planned
    epochs_done: int = 0
    best_epoch: int = 0  # that of the checkpoint
    holdout_clean_accuracy: float
    holdout_pgd10_accuracy: float | None = None
    seconds_per_epoch: float = 0.0
    seconds: float | None = None  # of post-training quantization
    size_bytes: int
    epsilon: float | None
    seed: int
    collapsed: Collapse | None = None  # the collapse of robust accuracy that ended the run
    shortfalls: tuple[str, ...] = ()  # failed checks, in words
    float_holdout_accuracy: float | None = None  # of the float network that harden was given
    foreign: bool | None = None  # True: its weights are another program's, and may have seen the held-out images
    bits: int | None = None  # of harden, as the next
    method: str | None = None

    @classmethod
    def of(
        cls,
        run: Path,
        spec: ModelSpec,
        recipe: Recipe,
        data: Dataset,
        answers: tuple[int, int],
        *,
        hardened: bool,
        **others: Any,
    ) -> TrainResult:
        """The result of a run of ``recipe`` in the folder ``run``; ``answers``: see :func:`accuracy_on_test`."""
        run, (right, count) = run.absolute(), answers
        chance, interval = constant_accuracy(data.test.labels), wilson_interval(right, count)
        return cls(
            checkpoint=run / "best.pt",
            run=run,
            model=spec.label,
            recipe=recipe.name,
            clean_accuracy=right / count,
            clean_interval=interval,
            test_images=count,
            chance=chance,
            near_chance=interval[0] <= chance,
            epochs=recipe.epochs,
            epsilon=spec.epsilon,
            bits=spec.weight_bits if hardened else None,
            method=recipe.method if hardened else None,
            **others,
        )
