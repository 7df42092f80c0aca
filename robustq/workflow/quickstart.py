"""quickstart: the whole job once, on the embedded digits, with the twins that a hardened model is compared with."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustq.checkpoint import load_model
from robustq.data import load_dataset
from robustq.evaluation.result import Evaluation
from robustq.evaluation.robust_accuracy import evaluate
from robustq.evaluation.suites import RECHECK
from robustq.files import check_output, free_path, write_text_atomically
from robustq.hardening.run_folder import RUNS
from robustq.progress import note
from robustq.workflow.export import export_model, recheck_bundle
from robustq.workflow.setup import pick_device
from robustq.workflow.train import harden_model, train_model

FLOAT, NATURAL, PTQ, HARDENED = (
    "digits/resnet8-float-natural",
    "digits/resnet8-w4a4-natural",
    "digits/resnet8-w4a4-ptq",
    "digits/resnet8-w4a4-odgq",
)


def quickstart(*, seed: int = 0, device: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Train, harden, export in three formats and re-check, on the digits data.

    Args:
        seed: of everything random but the data split, which is fixed.
        device: ``cpu``, ``cuda``; None: a GPU where there is one.
        out: folder for all results; must not exist. None: ``runs/quickstart``.

    Returns:
        ``steps`` (train, harden, export, recheck: what each command prints), ``rows`` (one per model), ``epsilon``,
        ``seconds``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    start = time.perf_counter()
    place = pick_device(device)
    check_output(out, RUNS)
    folder = out or free_path(RUNS / "quickstart")
    shared: dict[str, Any] = {"seed": seed, "device": str(place)}
    note("1/5  train a float ResNet-8 on the digits")
    trained = train_model(FLOAT, out=folder / "float-natural", **shared)
    checkpoint = Path(trained["checkpoint"])
    note("2/5  its undefended 4-bit twins: fine-tuned on clean images, and quantized without training")
    twin = harden_model(checkpoint, recipe=NATURAL, out=folder / "w4a4-natural", **shared)
    cheap = harden_model(checkpoint, recipe=PTQ, out=folder / "w4a4-ptq", **shared)
    note("3/5  harden: 4 bits with ODG-Q")
    hardened = harden_model(checkpoint, recipe=HARDENED, out=folder / "w4a4-hardened", **shared)
    note("4/5  export: QONNX, QCDQ, integer")
    exports = {
        name: export_model(
            Path(hardened["checkpoint"]),
            format_name=name,
            images=0,
            recheck=False,
            out=folder / f"export-{name}",
            **shared,
        )
        for name in ("qonnx", "qcdq", "integer")
    }
    note("5/5  attack all five models; the deployed file is counted on onnxruntime's answers")
    recheck = recheck_bundle(Path(exports["integer"]["bundle"]), images=0, **shared)
    epsilon = float(hardened["epsilon"])
    rows = [
        _row("float-natural", _attack(checkpoint, epsilon, seed, place), checkpoint),
        _row("w4a4-natural", _attack(Path(twin["checkpoint"]), epsilon, seed, place), Path(twin["checkpoint"])),
        _row("w4a4-ptq", _attack(Path(cheap["checkpoint"]), epsilon, seed, place), Path(cheap["checkpoint"])),
        _row(
            "w4a4-hardened", _attack(Path(hardened["checkpoint"]), epsilon, seed, place), Path(hardened["checkpoint"])
        ),
        _row("deployed-integer", recheck, Path(exports["integer"]["files"][0])),
    ]
    result = {
        "steps": {"train": trained, "harden": hardened, "export": exports, "recheck": recheck},
        "rows": rows,
        "epsilon": epsilon,
        "test_images": recheck["images"],
        "folder": str(folder.absolute()),
        "shortfalls": [fall for step in (hardened, *exports.values(), recheck) for fall in step["shortfalls"]],
        "seconds": time.perf_counter() - start,
    }
    write_text_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _attack(checkpoint: Path, epsilon: float, seed: int, device: torch.device) -> dict[str, Any]:
    network, spec, _ = load_model(checkpoint)
    images, labels = load_dataset(spec.data).test.take(0)
    return _evaluate(network.to(device), images, labels, epsilon, seed, device).to_dict()


def _evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, seed: int, device: torch.device
) -> Evaluation:
    return evaluate(model, model, images, labels, attacks=RECHECK, epsilon=epsilon, device=device, seed=seed)


def _row(name: str, found: dict[str, Any], file: Path) -> dict[str, Any]:
    return {
        "model": name,
        "clean": found["clean_accuracy"],
        **found["attacks"],
        "worst_case": found["robust_accuracy"],
        "worst_case_interval": found["interval"],
        "size_bytes": file.stat().st_size,
    }
