"""From a folded PyTorch network to ONNX, by the exporters of Brevitas and torch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from robustq.errors import ExportError, one_line
from robustq.export.lowering.pads import explicit_pads
from robustq.models.spec import ModelSpec

OPSET = 17
INPUT, OUTPUT = "images", "logits"


def export_qcdq(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """Standard ONNX of a folded network: quantizers are QuantizeLinear - Clip - DequantizeLinear, weights integers."""
    from brevitas.export import export_onnx_qcdq

    return _export(export_onnx_qcdq, folded, spec)


def export_qonnx(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """QONNX (arXiv:2206.07527): every quantizer is a Quant or BipolarQuant node of qonnx.custom_op.general.

    ``network`` is folded, or unfolded in eval mode: then BatchNormalization stays a node.
    """
    from brevitas.export import export_qonnx as brevitas_export_qonnx

    return _export(brevitas_export_qonnx, network, spec)


def export_float(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """Plain ONNX of a float network."""

    def exporter(module: nn.Module, *, args: torch.Tensor, export_path: str, **options: Any) -> None:
        torch.onnx.export(module, (args,), export_path, **options)

    return _export(exporter, folded, spec)


def _export(exporter: Any, folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    example = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    with tempfile.TemporaryDirectory() as folder, _without_library_noise():
        path = Path(folder) / "exported.onnx"
        try:
            exporter(
                folded,
                args=example,
                export_path=str(path),
                # The dynamo exporter fails on residual networks or grows inputs, and Int32Bias raises in it.
                dynamo=False,
                # Brevitas' default makes every initializer an input, and then onnxruntime fuses nothing.
                keep_initializers_as_inputs=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"{spec.label}: torch cannot write it as ONNX ({one_line(error, longest=120)})"
            ) from error
        model = onnx.load(path)
    explicit_pads(model)
    return model


@contextmanager
def _without_library_noise() -> Iterator[None]:
    """Silence the exporter that ``dynamo=False`` selects: deprecation notes, and its graph when it fails."""
    # On by default, and torch 2.15 does not switch it off without ``verbose``, as it means to.
    torch._C._jit_set_onnx_log_enabled(False)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
