"""What a file says of itself, in ONNX' metadata_props, so that whoever holds nothing but the file can use it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from robustq.models.spec import ModelSpec

PREFIX = "robustq."

INPUT_RANGE = {
    "float": "float32 (N, C, H, W) in [0, 1]: pixel / 255",
    "uint8": "uint8 (N, C, H, W): pixels 0 to 255",
}

PACKAGES = ("torch", "brevitas", "onnx")
"""Whose versions decide what the file holds."""


def describe(model: onnx.ModelProto, spec: ModelSpec, *, format_name: str, pixels: str) -> None:
    """Replace the metadata of ``model`` by what ``spec`` says: format, input, classes, data, widths, versions."""
    # A shipped file tells the data's name, not where it lay on somebody's disk.
    public = {**spec.to_dict(), "data": Path(spec.data).name}
    del model.metadata_props[:]
    _set(model, "version", version("robustq"))
    _set(model, "format", format_name)
    _set(model, "spec", json.dumps(public))
    _set(model, "input", INPUT_RANGE[pixels])
    _set(model, "data", public["data"])
    _set(model, "classes", json.dumps(list(spec.class_names or map(str, range(spec.classes)))))
    _set(model, "bits", f"weights {spec.weight_bits}, activations {spec.act_bits}")
    _set(model, "made_with", json.dumps({name: version(name) for name in PACKAGES}))


def add_results(
    path: Path, *, accuracy: dict[str, Any], equal_in: list[str], not_for: list[str], failed: list[str]
) -> None:
    """Write into the file at ``path`` what was found about it; what it computes stays as it was.

    Args:
        path: an .onnx file that :func:`describe` described.
        accuracy: plain values: images, clean accuracy and, if attacked, robust accuracy, epsilon, suite, verdict.
        equal_in: runtimes with their versions in which the answers were proved equal to the network's.
        not_for: runtimes and settings in which the file may not be used, in sentences.
        failed: checks that the file did not pass, in words.
    """
    model = onnx.load(path)
    _set(model, "accuracy", json.dumps(accuracy))
    _set(model, "equal_in", json.dumps(equal_in))
    _set(model, "not_for", json.dumps(not_for))
    _set(model, "failed", json.dumps(failed))
    onnx.save(model, path)


def _set(model: onnx.ModelProto, key: str, value: str) -> None:
    for entry in model.metadata_props:
        if entry.key == PREFIX + key:
            entry.value = value
            return
    model.metadata_props.add(key=PREFIX + key, value=value)
