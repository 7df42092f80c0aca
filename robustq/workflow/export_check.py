"""Trial export of a custom network before it is trained: what cannot be deployed is refused in seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from torch import Tensor, nn

from robustq.data import Dataset
from robustq.errors import ExportError, ModelFileError, UsageError
from robustq.export.formats import build, check_size
from robustq.export.recheck import prove
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from robustq.progress import note

IMAGES = 32
"""Training images on which the trial file is compared with the network."""


def check_file_size(weights: dict[str, Tensor]) -> None:
    """UsageError for weights that fit into no .onnx file; in no time."""
    try:
        check_size(sum(one.numel() for one in weights.values()))
    except ExportError as error:
        raise UsageError(f"{error}; --no-checks trains it all the same") from error


def check_export(network: nn.Module, spec: ModelSpec, data: Dataset) -> None:
    """Export a calibrated network into a temporary file and compare the two.

    UsageError if the export fails, or the file answers otherwise. A note names convolutions that stay in float.
    """
    format_name = "float" if spec.widths.is_float else "integer"
    try:
        folded = fold(network, spec)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.onnx"
            onnx.save(build(format_name, folded, spec), path)
            proof = prove(path, format_name, folded, spec, data.train.take(min(IMAGES, len(data.train)))[0])
    except (ExportError, ModelFileError) as error:
        raise UsageError(f"{error}; --no-checks trains it all the same") from error
    # Among so few images rounding ties may change an answer: a fault is a first difference that is none.
    wrong = [run for run, each in proof.agreements.items() if not each.holds and run not in proof.on_ties]
    if wrong and proof.first_difference is not None:
        raise UsageError(
            f"{spec.label} exported as {format_name} answers otherwise than in PyTorch "
            f"({wrong[0]}: {proof.agreements[wrong[0]].failure}); --no-checks trains it all the same"
        )
    in_float = proof.layers.float_convolutions
    if in_float and not spec.widths.is_float:
        note(f"export  {len(in_float)} convolutions would stay in float: {', '.join(in_float[:3])}")
