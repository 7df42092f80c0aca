"""The evidence of an export folder as CycloneDX 1.6: one component with its hashes and a modelCard.

Plain JSON by the published schema: the Python library of CycloneDX has no class for model cards (11.12).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustq.recipe import format_epsilon
from robustq.seals import sha256

NAME = "card.cdx.json"

NAMESPACE = uuid.UUID("6f1c0b0e-6c0b-5f1e-9a37-6d0f6c1b7a52")
"""Of the serial number, which is that of the file's hash: the same file has the same document."""


def write_cyclonedx(folder: Path, record: Mapping[str, Any], file: Path, *others: Path) -> Path:
    """Write card.cdx.json into ``folder``.

    Args:
        record: content of bundle.json, without its hashes.
        file: the .onnx in the folder, as it stays.
        others: further files of the folder, such as model.pt.
    """
    digest = sha256(file)
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": name, "version": version}
                    for name, version in record["versions"].items()
                ]
            },
            "component": {
                "type": "machine-learning-model",
                "bom-ref": file.name,
                "name": record["label"],
                "version": digest[:12],
                "hashes": _hashes(digest),
                "modelCard": _model_card(record),
                "properties": _properties(record),
            },
        },
        "components": [
            {"type": "file", "bom-ref": one.name, "name": one.name, "hashes": _hashes(sha256(one))} for one in others
        ],
    }
    path = folder / NAME
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _model_card(record: Mapping[str, Any]) -> dict[str, Any]:
    limits = [*record["shortfalls"], *(f"not for {limit}" for limit in record["not_for"])]
    limits += [flag["text"] for flag in (record["recheck"] or {}).get("flags", [])]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "modelArchitecture": record["label"],
            "datasets": [{"type": "dataset", "name": Path(record["data"]).name}],
            "inputs": [{"format": record["preprocessing"]["range"]}],
            "outputs": [{"format": "float32 logits (N, K)"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(record)},
        "considerations": {"technicalLimitations": limits},
    }


def _metrics(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Clean and robust accuracy, in the judge and in each other runtime; a robust accuracy is an upper bound."""
    counted = record["recheck"]
    if not counted:
        return []
    test = f"{counted['images']} test images of {Path(record['data']).name}"
    attacked = (
        f"{test}, under attack within {format_epsilon(counted['epsilon'])} (suite {record['suite']}, upper bound)"
    )
    found = [
        _metric("accuracy", counted["clean_accuracy"], counted["clean_interval"], f"{test}, {record['judge']}"),
        _metric("robust accuracy", counted["robust_accuracy"], counted["interval"], f"{attacked}, {record['judge']}"),
    ]
    for one in (record.get("target") or {}).get("replayed", ()):
        if one["refused"] is None:
            name = f"{one['runtime']} {one['version']}"
            found.append(_metric("accuracy", one["clean_accuracy"], one["clean_interval"], f"{test}, {name}"))
            where = f"{attacked}, the images found for {record['judge']} in {name}"
            found.append(_metric("robust accuracy", one["robust_accuracy"], one["robust_interval"], where))
    return found


def _metric(kind: str, value: float, interval: list[float], where: str) -> dict[str, Any]:
    """The 95% interval is Wilson's."""
    low, high = (f"{bound:.6g}" for bound in interval)
    bounds = {"lowerBound": low, "upperBound": high}
    return {"type": kind, "value": f"{value:.6g}", "slice": where, "confidenceInterval": bounds}


def _properties(record: Mapping[str, Any]) -> list[dict[str, str]]:
    shown = {name: record[name] for name in ("format", "weight_bits", "act_bits", "input", "size_bytes", "seed")}
    shown["integer_layers"], shown["float_layers"] = (len(record[f"{kind}_layers"]) for kind in ("integer", "float"))
    if record.get("target"):
        shown["target"], shown["checked"] = record["target"]["name"], record["target"]["text"]
    return [{"name": f"robustq:{name}", "value": str(value)} for name, value in shown.items()]
