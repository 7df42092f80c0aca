"""Format name -> file: which exporter and which passes make it, and what a file says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
from torch import nn

from robustq.errors import ExportError, UsageError
from robustq.export.lowering.accumulator_biases import accumulator_biases
from robustq.export.lowering.folded_constants import folded_constants
from robustq.export.lowering.own_parameters import own_parameters
from robustq.export.lowering.padding_in_convolutions import padding_in_convolutions
from robustq.export.lowering.quantized_moves import quantized_moves
from robustq.export.lowering.unsigned_activations import unsigned_activations
from robustq.export.qonnx_file import clean_up
from robustq.export.torch_export import export_qcdq, export_qonnx
from robustq.models.spec import ModelSpec


def _qonnx(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    return clean_up(export_qonnx(folded, spec))


def _qcdq(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    return export_qcdq(folded, spec)


def _integer(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = export_qcdq(folded, spec)
    folded_constants(model)
    padding_in_convolutions(model)
    unsigned_activations(model)
    quantized_moves(model)  # before the biases: it shows what quantized tensor enters a layer behind a pooling
    accumulator_biases(model)
    own_parameters(model)
    onnx.checker.check_model(model)
    return model


FORMATS: dict[str, Callable[[nn.Module, ModelSpec], onnx.ModelProto]] = {
    "qonnx": _qonnx,
    "qcdq": _qcdq,
    "integer": _integer,
}
"""qonnx: Quant nodes, for FINN and hls4ml. qcdq: standard QuantizeLinear - Clip - DequantizeLinear. integer: the same
arithmetic arranged so that onnxruntime runs every layer as integers, on x86 and on ARM.
"""


def check_format(name: str, spec: ModelSpec) -> None:
    """Refuse an unknown format, or one that cannot hold this network.

    Raises:
        UsageError: unknown name.
        ExportError: a float network in a format of quantized ones, or a network with 1-bit layers.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'; known: {', '.join(FORMATS)}")
    if spec.widths.is_float:
        raise ExportError(
            f"a 32-bit (float) network cannot be written as {name}; quantize it first: robustq harden MODEL --bits 4"
        )
    if 1 in (spec.weight_bits, spec.act_bits, *dict(spec.layer_bits).values()):
        raise ExportError(
            f"{spec.label} has 1-bit layers, which this version cannot write as {name}; export 2 bits or more"
        )


def build(name: str, folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """The ONNX model of ``folded`` in format ``name``, with its spec in metadata_props."""
    model = FORMATS[name](folded, spec)
    del model.metadata_props[:]
    # A shipped file tells the data's name, not where it lay on somebody's disk.
    public = {**spec.to_dict(), "data": Path(spec.data).name}
    about = {"robustq.version": version("robustq"), "robustq.format": name, "robustq.spec": json.dumps(public)}
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    return model
