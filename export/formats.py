"""Formats: the exporter and the passes of each, and its promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from torch import nn

from robustq.errors import ExportError, UsageError
from robustq.export.binary_qcdq import without_binary_quantizers
from robustq.export.lowering.biases import accumulator_biases, bias_zero_points, implied_zero_points
from robustq.export.lowering.binary_activations import binary_activations
from robustq.export.lowering.constants import folded_constants, own_constants
from robustq.export.lowering.fixed_point_multipliers import fixed_point_multipliers
from robustq.export.lowering.islands import float_layers
from robustq.export.lowering.packed_weights import packed_weights
from robustq.export.lowering.pads import padding_in_convolutions
from robustq.export.lowering.requantize import quantized_moves, rounded_sums
from robustq.export.lowering.short_names import short_names
from robustq.export.lowering.symmetric_int8 import symmetric_int8
from robustq.export.lowering.uint8 import uint8_pixels, unsigned_activations
from robustq.export.metadata import describe
from robustq.export.qonnx_file import clean_up
from robustq.export.ranges import check_ranges
from robustq.export.torch_export import export_float, export_qcdq, export_qonnx
from robustq.models.spec import ModelSpec

HLS4ML = "hls4ml"
TENSORRT = "tensorrt"
"""Consumer of a QCDQ file, which the target of that name asks for."""
CONSUMERS = {"finn": "FINN", "hls4ml": "hls4ml"}
"""Tools that a QONNX file can be written for, as --for takes them -> their names; the first is the default."""


@dataclass(frozen=True)
class Format:
    """A way to write a network.

    ``runs`` of :data:`robustq.export.parity.RUNS` must agree with the network; none where onnxruntime cannot load it.
    """

    make: Callable[[nn.Module, ModelSpec], onnx.ModelProto]  # of the folded network; QONNX takes unfolded ones as well
    summary: str  # a phrase for --help
    is_float: bool = False  # for 32-bit networks instead of quantized ones
    promises_integers: bool = False  # onnxruntime must run every convolution as integers
    runs: tuple[str, ...] = ("optimised", "unoptimised", "exact")
    pixels: tuple[str, ...] = ("float", "uint8")  # allowed inputs
    batch_norm: tuple[str, ...] = ("fold",)  # allowed treatments of BatchNorm


def _qonnx(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = clean_up(export_qonnx(network, spec))
    bias_zero_points(model)
    return model


def _quantized(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = export_qcdq(without_binary_quantizers(folded), spec)
    folded_constants(model, but=frozenset({"Clip"}))  # Clip marks the width
    accumulator_biases(model)  # onnxruntime before 1.27 reads every bias in the accumulator's step
    check_ranges(model)
    float_layers(model)
    return model


def _qcdq(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _quantized(folded, spec)
    if spec.act_bits > 1:
        # At zero point 0 OpenVINO ignores the pairs of rounded_sums. Binary activations stay int8: with unsigned ones
        # onnxruntime 1.18.1 gives other answers.
        unsigned_activations(model)
    rounded_sums(model)
    own_constants(model)
    return model


def _integer(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _quantized(folded, spec)
    folded_constants(model)
    padding_in_convolutions(model)
    unsigned_activations(model)
    quantized_moves(model)  # so that binary activations behind a pooling meet a DequantizeLinear
    binary_activations(model)
    rounded_sums(model)
    own_constants(model)
    return model


def _packed(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _integer(folded, spec)
    packed_weights(model)
    implied_zero_points(model)
    short_names(model)
    return model


FORMATS: dict[str, Format] = {
    "qonnx": Format(_qonnx, summary="FINN, hls4ml", runs=(), pixels=("float",), batch_norm=("fold", "keep")),
    "qcdq": Format(_qcdq, summary="any ONNX runtime"),
    "integer": Format(_integer, summary="onnxruntime, all layers integer", promises_integers=True),
    "packed": Format(_packed, summary="as integer, in the smallest file", promises_integers=True),
    "float": Format(export_float, summary="32-bit networks", is_float=True),
}
"""qonnx: Quant nodes, for FINN and hls4ml. qcdq: standard QuantizeLinear - Clip - DequantizeLinear, with weight codes
multiplied so that the accumulator counts in the steps of the bias. integer: the same arithmetic arranged so that
onnxruntime runs every layer as integers, on x86 and on ARM. packed: that, in the smallest file. float: plain ONNX of a
32-bit network.
"""


def check_format(
    name: str, spec: ModelSpec, *, pixels: str = "float", batch_norm: str = "fold", consumer: str | None = None
) -> None:
    """Refuse an unknown format or option, or a format that cannot hold this network.

    Raises:
        UsageError: unknown name, or an option that the format does not have.
        ExportError: a float network in a format of quantized ones, or vice versa.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'; known: {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    for option, value, known in (("input", pixels, chosen.pixels), ("batch-norm", batch_norm, chosen.batch_norm)):
        if value not in known:
            raise UsageError(f"--{option} {value} is not known to {name}; choose {' or '.join(known)}")
    if consumer is not None:
        _check_consumer(name, spec, consumer, batch_norm)
    if spec.widths.is_float and not chosen.is_float:
        first = f"a 32-bit (float) network cannot be written as {name}; write it as float, or quantize it first"
        raise ExportError(f"{first}: robustq harden MODEL --bits 4")
    if chosen.is_float and not spec.widths.is_float:
        raise ExportError(f"{spec.label} is quantized, and float holds 32-bit networks only; write it as qcdq")


def _check_consumer(name: str, spec: ModelSpec, consumer: str, batch_norm: str) -> None:
    if consumer == TENSORRT and name == "qcdq":
        return
    if consumer not in CONSUMERS:
        raise UsageError(f"--for {consumer} is not known; choose {' or '.join(CONSUMERS)}")
    if name != "qonnx":
        raise UsageError(f"--for {consumer} goes with --format qonnx, not with {name}")
    if consumer != HLS4ML:
        return
    if batch_norm == "keep":
        raise UsageError("--for hls4ml folds BatchNorm into fixed-point multipliers; leave out --batch-norm keep")
    if 1 in (spec.weight_bits, spec.act_bits, *(bits for _, bits in spec.layer_bits)):
        raise ExportError(f"{spec.label}: --for hls4ml holds no layers of 1 bit; harden with --bits 2 or more")
    if spec.normalisation is not None:
        raise ExportError(f"{spec.label}: --for hls4ml takes pixels in [0, 1]; harden without --normalisation")


def build(
    name: str, network: nn.Module, spec: ModelSpec, *, pixels: str = "float", consumer: str | None = None
) -> onnx.ModelProto:
    """The ONNX model of ``network`` in format ``name``, with metadata.

    Args:
        network: folded; for ``qonnx`` with BatchNorm kept, unfolded.
        pixels: ``float`` for an input in [0, 1], ``uint8`` for pixels as they are.
        consumer: one of :data:`CONSUMERS`, for ``qonnx`` alone; :data:`TENSORRT`, for ``qcdq``.

    Raises:
        ExportError: the network has an operator that the format or the consumer cannot hold, or is too large.
    """
    check_size(sum(one.numel() for one in network.parameters()))
    model = FORMATS[name].make(network, spec)
    if consumer == HLS4ML:
        fixed_point_multipliers(model)
    if consumer == TENSORRT:
        symmetric_int8(model)
    if pixels == "uint8":
        uint8_pixels(model)
    if name != "qonnx":  # whose operators the checker does not know
        onnx.checker.check_model(model)
    describe(model, spec, format_name=name, pixels=pixels)
    return model


LARGEST = 2**31 // 4
"""Parameters of float32 in the 2 GiB that one protobuf message holds."""


def check_size(parameters: int) -> None:
    """ExportError for a network that no .onnx file can hold on its way from PyTorch, where weights are float32."""
    if parameters > LARGEST:
        raise ExportError(
            f"{parameters / 1e6:,.0f} million parameters do not fit into an ONNX file of 2 GiB (float32, before they "
            f"are packed); take a network of at most {LARGEST // 10**6} million"
        )
