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
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import evaluate
from robustq.evaluation.suites import RECHECK
from robustq.export.session import OnnxModel
from robustq.files import check_output, free_path, optional_path, write_text_atomically
from robustq.hardening.run_folder import RUNS
from robustq.models.quant.folding import fold
from robustq.progress import note
from robustq.workflow import Result
from robustq.workflow.export import export_model
from robustq.workflow.harden import harden_model
from robustq.workflow.recheck import recheck_bundle
from robustq.workflow.setup import pick_device
from robustq.workflow.train import train_model

FLOAT, NATURAL, PTQ, HARDENED = (
    "digits/resnet8-float-natural",
    "digits/resnet8-w4a4-natural",
    "digits/resnet8-w4a4-ptq",
    "digits/resnet8-w4a4-odgq",
)


@dataclass(frozen=True, eq=False)
class QuickstartRow(Result):
    """One model in the table of quickstart; ``attacks`` by name."""

    FLAT = ("attacks",)

    model: str
    clean: float
    attacks: dict[str, float]
    worst_case: float
    worst_case_interval: tuple[float, float]
    size_bytes: int


@dataclass(frozen=True, eq=False)
class QuickstartResult(Result):
    """Result of quickstart."""

    steps: dict[str, Any]  # results of ``train``, ``harden``, ``export`` (by format) and ``recheck``
    rows: tuple[QuickstartRow, ...]  # one per model
    epsilon: float
    test_images: int
    folder: Path
    shortfalls: tuple[str, ...]  # failed checks, in words
    seconds: float


def quickstart(*, seed: int = 0, device: str | None = None, out: Path | str | None = None) -> QuickstartResult:
    """Train, harden, export in four formats and re-check, on the digits data.

    Args:
        seed: of everything random but the data split, which is fixed.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``; None: a GPU if there is one.
        out: path of the new folder for all results; None: ``runs/quickstart``, numbered if it exists.

    Returns:
        the results of all steps, and one row of accuracies (fractions) per model.

    Raises:
        UsageError: an unknown device.
        OutputExistsError: ``out`` exists.
    """
    start = time.perf_counter()
    place, out = pick_device(device), optional_path(out)
    check_output(out, RUNS)
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
    note("4/5  export: QONNX, QCDQ, integer, packed")
    exports = {
        name: export_model(
            hardened.checkpoint, format_name=name, images=0, recheck=False, out=folder / f"export-{name}", **shared
        )
        for name in ("qonnx", "qcdq", "integer", "packed")
    }
    note("5/5  attack all models; the deployed files are judged on onnxruntime's answers")
    recheck = recheck_bundle(exports["integer"].bundle, images=0, **shared)
    epsilon = float(hardened["epsilon"])
    rows = [
        _row(step.run.name, _attack(step.checkpoint, epsilon, seed, place), step.checkpoint)
        for step in (trained, natural, ptq, hardened)
    ]
    packed = exports["packed"]
    judged = _attack(hardened.checkpoint, epsilon, seed, place, deployed=packed.files[0])
    rows.append(_row("deployed-integer", recheck.evaluation, exports["integer"].files[0]))
    rows.append(_row("deployed-packed", judged, packed.files[0]))
    result = QuickstartResult(
        {"train": trained, "harden": hardened, "export": exports, "recheck": recheck},
        tuple(rows),
        epsilon,
        recheck.evaluation.images,
        folder.absolute(),
        tuple(failure for step in (hardened, *exports.values(), recheck) for failure in step["shortfalls"]),
        time.perf_counter() - start,
    )
    write_text_atomically(folder / "result.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _attack(
    checkpoint: Path, epsilon: float, seed: int, device: torch.device, *, deployed: Path | None = None
) -> Evaluation:
    """The attacks of a re-check on a model file, or on the answers of the file that was made from it."""
    network, spec, _ = load_model(checkpoint)
    images, labels = load_dataset(spec.data).test.take(0)
    model = (network if deployed is None else fold(network, spec)).to(device)
    judge = model if deployed is None else OnnxModel(deployed)
    return evaluate(judge, model, images, labels, attacks=RECHECK, epsilon=epsilon, device=device, seed=seed)


def _row(name: str, found: Evaluation, file: Path) -> QuickstartRow:
    result = found.to_dict()
    attacks, interval = result["attacks"], result["interval"]
    return QuickstartRow(name, found.clean_accuracy, attacks, found.robust_accuracy, interval, file.stat().st_size)
