"""quickstart: the whole job once on the embedded digits, with undefended models for comparison."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustq.checkpoint import load_model
from robustq.data import load_dataset
from robustq.evaluation.evaluate import evaluate
from robustq.evaluation.result import Evaluation
from robustq.evaluation.suites import RECHECK
from robustq.files import check_place, free_path, write_text_atomically
from robustq.hardening.run_folder import RUNS
from robustq.progress import note
from robustq.workflow import Result
from robustq.workflow.export import ExportResult, RecheckResult, export_model, recheck_bundle
from robustq.workflow.setup import pick_device
from robustq.workflow.train import harden_model, train_model
from robustq.workflow.training_run import TrainResult

FLOAT, NATURAL, PTQ, HARDENED = (
    "digits/resnet8-float-natural",
    "digits/resnet8-w4a4-natural",
    "digits/resnet8-w4a4-ptq",
    "digits/resnet8-w4a4-odgq",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class QuickstartRow(Result):
    """One model in the table of quickstart.

    Args:
        model: name of the row.
        evaluation: its accuracies.
        size_bytes: of its file.
    """

    model: str
    evaluation: Evaluation
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The keys of a row in ``robustq quickstart --json``."""
        found = self.evaluation.to_dict()
        return {
            "model": self.model,
            "clean": found["clean_accuracy"],
            **found["attacks"],
            "worst_case": found["robust_accuracy"],
            "worst_case_interval": found["interval"],
            "size_bytes": self.size_bytes,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class QuickstartResult(Result):
    """Result of quickstart.

    Args:
        train, harden, exports, recheck: results of the steps; ``exports`` by format.
        rows: one per model.
        epsilon: radius in [0, 1].
        folder: of all results.
        seconds: wall time.
    """

    train: TrainResult
    harden: TrainResult
    exports: dict[str, ExportResult]
    recheck: RecheckResult
    rows: tuple[QuickstartRow, ...]
    epsilon: float
    folder: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``robustq quickstart --json``."""
        checked = (self.harden, *self.exports.values(), self.recheck)
        return {
            "steps": {
                "train": self.train.to_dict(),
                "harden": self.harden.to_dict(),
                "export": {name: export.to_dict() for name, export in self.exports.items()},
                "recheck": self.recheck.to_dict(),
            },
            "rows": [row.to_dict() for row in self.rows],
            "epsilon": self.epsilon,
            "test_images": self.recheck.evaluation.images,
            "folder": str(self.folder),
            "shortfalls": [failure for step in checked for failure in step["shortfalls"]],
            "seconds": self.seconds,
        }


def quickstart(*, seed: int = 0, device: str | None = None, out: Path | None = None) -> QuickstartResult:
    """Train, harden, export in three formats and re-check, on the digits data.

    Args:
        seed: of everything random but the data split, which is fixed.
        device: ``cpu``, ``cuda``; None: a GPU if there is one.
        out: folder for all results; must not exist. None: ``runs/quickstart``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    start = time.perf_counter()
    place = pick_device(device)
    check_place(out, RUNS)
    folder = out or free_path(RUNS / "quickstart")
    shared: dict[str, Any] = {"seed": seed, "device": str(place)}
    note("1/5  train a float ResNet-8 on the digits")
    trained = train_model(FLOAT, out=folder / "float-natural", **shared)
    source = trained.checkpoint
    note("2/5  two undefended 4-bit models: fine-tuned on clean images, and quantized without training")
    natural = harden_model(source, recipe=NATURAL, out=folder / "w4a4-natural", **shared)
    ptq = harden_model(source, recipe=PTQ, out=folder / "w4a4-ptq", **shared)
    note("3/5  harden: 4 bits with ODG-Q")
    hardened = harden_model(source, recipe=HARDENED, out=folder / "w4a4-hardened", **shared)
    note("4/5  export: QONNX, QCDQ, integer")
    exports = {
        name: export_model(
            hardened.checkpoint, format_name=name, images=0, recheck=False, out=folder / f"export-{name}", **shared
        )
        for name in ("qonnx", "qcdq", "integer")
    }
    note("5/5  attack all five models; the deployed file is judged on onnxruntime's answers")
    deployed = exports["integer"]
    recheck = recheck_bundle(deployed.bundle, images=0, **shared)
    epsilon = float(hardened["epsilon"])
    rows = [
        QuickstartRow(
            model=step.run.name,
            evaluation=_attack(step.checkpoint, epsilon, seed, place),
            size_bytes=step.checkpoint.stat().st_size,
        )
        for step in (trained, natural, ptq, hardened)
    ]
    size = deployed.files[0].stat().st_size
    rows.append(QuickstartRow(model="deployed-integer", evaluation=recheck.evaluation, size_bytes=size))
    result = QuickstartResult(
        train=trained,
        harden=hardened,
        exports=exports,
        recheck=recheck,
        rows=tuple(rows),
        epsilon=epsilon,
        folder=folder.absolute(),
        seconds=time.perf_counter() - start,
    )
    write_text_atomically(folder / "result.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _attack(checkpoint: Path, epsilon: float, seed: int, device: torch.device) -> Evaluation:
    network, spec, _ = load_model(checkpoint)
    images, labels = load_dataset(spec.data).test.take(0)
    model = network.to(device)
    return evaluate(model, model, images, labels, attacks=RECHECK, epsilon=epsilon, device=device, seed=seed)
