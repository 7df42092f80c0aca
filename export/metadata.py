"""Metadata of a file, in ONNX' metadata_props: enough to use the file alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from robustq.models.preprocessing import preprocessing_of
from robustq.models.spec import ModelSpec

PREFIX = "robustq."

INPUT_RANGE = {
    "float": "float32 (N, C, H, W) in [0, 1]: pixel / 255",
    "uint8": "uint8 (N, C, H, W): pixels 0 to 255",
}

PACKAGES = ("torch", "brevitas", "onnx")
"""Packages whose versions decide the content of the file."""


def describe(model: onnx.ModelProto, spec: ModelSpec, *, format_name: str, pixels: str) -> None:
    """Replace the metadata of ``model``: format, input, preprocessing, classes, data, widths, versions."""
    # The name of the data, not its folder on somebody's disk.
    public = {**spec.to_dict(), "data": Path(spec.data).name}
    texts = {
        "version": version("robustq"),
        "format": format_name,
        "spec": json.dumps(public),
        "input": INPUT_RANGE[pixels],
        "preprocessing": json.dumps(preprocessing_of(spec, pixels=pixels)),
        "data": public["data"],
        "classes": json.dumps(list(spec.class_names or map(str, range(spec.classes)))),
        "bits": f"weights {spec.weight_bits}, activations {spec.act_bits}",
        "made_with": json.dumps({name: version(name) for name in PACKAGES}),
    }
    helper.set_model_props(model, {PREFIX + key: text for key, text in texts.items()})


def add_results(
    path: Path, *, accuracy: dict[str, Any], equal_in: list[str], not_for: list[str], failed: list[str]
) -> None:
    """Add the results of the checks to the metadata of the file at ``path``, which :func:`describe` has begun.

    Args:
        accuracy: plain values: images, clean accuracy and, if attacked, robust accuracy, epsilon, suite, verdict.
        equal_in: runtimes with their versions in which the answers were proved equal to the network's.
        not_for: runtimes and settings in which the file may not be used, in sentences.
        failed: checks that the file did not pass, in sentences.
    """
    model = onnx.load(path)
    results = {"accuracy": accuracy, "equal_in": equal_in, "not_for": not_for, "failed": failed}
    texts = {entry.key: entry.value for entry in model.metadata_props}
    texts |= {PREFIX + key: json.dumps(result) for key, result in results.items()}
    helper.set_model_props(model, texts)
    onnx.save(model, path)
