"""Format name -> file: which exporter and which passes make it, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx
from torch import nn

from robustq.errors import ExportError, UsageError
from robustq.export.lowering.accumulator_biases import accumulator_biases
from robustq.export.lowering.constants import folded_constants, own_constants
from robustq.export.lowering.fixed_point_multipliers import fixed_point_multipliers
from robustq.export.lowering.integer_signs import integer_signs
from robustq.export.lowering.packed_weights import packed_weights
from robustq.export.lowering.pads import padding_in_convolutions
from robustq.export.lowering.quantized_moves import quantized_moves
from robustq.export.lowering.rounded_sums import rounded_sums
from robustq.export.lowering.short_names import short_names
from robustq.export.lowering.uint8_pixels import uint8_pixels
from robustq.export.lowering.unsigned_activations import unsigned_activations
from robustq.export.lowering.zero_points import bias_zero_points, implied_zero_points
from robustq.export.metadata import describe
from robustq.export.qonnx_file import clean_up
from robustq.export.ranges import check_ranges
from robustq.export.signs_in_qcdq import signs_in_qcdq
from robustq.export.torch_export import export_float, export_qcdq, export_qonnx
from robustq.models.spec import ModelSpec

Pixels = Literal["float", "uint8"]
BatchNorm = Literal["fold", "keep"]

FINN, HLS4ML = "finn", "hls4ml"
CONSUMERS = (FINN, HLS4ML)
"""Tools that a QONNX file can be written for; the first is the default."""


@dataclass(frozen=True)
class Format:
    """A way to write a network down.

    Args:
        make: (folded network, what it is) -> the model. QONNX takes unfolded networks as well.
        is_float: for 32-bit networks instead of quantized ones.
        promises_integers: whether onnxruntime must run every convolution as integers.
        runs: ways to run it that must agree with the network (:data:`robustq.export.parity.RUNS`); none where
            onnxruntime cannot load it.
        pixels: what the input may be.
        batch_norm: what may become of BatchNorm.
    """

    make: Callable[[nn.Module, ModelSpec], onnx.ModelProto]
    is_float: bool = False
    promises_integers: bool = False
    runs: tuple[str, ...] = ("optimised", "unoptimised", "exact")
    pixels: tuple[Pixels, ...] = ("float", "uint8")
    batch_norm: tuple[BatchNorm, ...] = ("fold",)


def _qonnx(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = clean_up(export_qonnx(network, spec))
    bias_zero_points(model)
    return model


def _qonnx_for_hls4ml(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _qonnx(folded, spec)
    fixed_point_multipliers(model)
    return model


def _quantized(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = export_qcdq(signs_in_qcdq(folded), spec)
    folded_constants(model, but=frozenset({"Clip"}))  # a Clip is how QCDQ says that eight bits hold fewer
    accumulator_biases(model)  # onnxruntime before 1.27 reads every bias in the accumulator's step
    check_ranges(model)
    return model


def _qcdq(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _quantized(folded, spec)
    if spec.act_bits > 1:
        # Where the zero point is 0, OpenVINO sees through what rounded_sums adds. Signs stay as they are: of unsigned
        # ones onnxruntime 1.18.1 makes integer convolutions with other answers.
        unsigned_activations(model)
    rounded_sums(model)
    own_constants(model)
    return model


def _integer(folded: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    model = _quantized(folded, spec)
    folded_constants(model)
    padding_in_convolutions(model)
    unsigned_activations(model)
    quantized_moves(model)  # it shows what quantized tensor enters a layer or a sign behind a pooling
    integer_signs(model)
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
    "qonnx": Format(_qonnx, runs=(), pixels=("float",), batch_norm=("fold", "keep")),
    "qcdq": Format(_qcdq),
    "integer": Format(_integer, promises_integers=True),
    "packed": Format(_packed, promises_integers=True),
    "float": Format(export_float, is_float=True),
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
        ExportError: a float network in a format of quantized ones, or the other way round.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'; known: {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    for option, value, known in (("input", pixels, chosen.pixels), ("batch-norm", batch_norm, chosen.batch_norm)):
        if value not in known:
            raise UsageError(f"--{option} {value} is not known to {name}; choose {' or '.join(known)}")
    _check_consumer(name, spec, consumer, batch_norm)
    if spec.widths.is_float and not chosen.is_float:
        raise ExportError(
            f"a 32-bit (float) network cannot be written as {name}; write it as float, or quantize it first: "
            "robustq harden MODEL --bits 4"
        )
    if chosen.is_float and not spec.widths.is_float:
        raise ExportError(f"{spec.label} is quantized, and float holds 32-bit networks only; write it as qcdq")


def _check_consumer(name: str, spec: ModelSpec, consumer: str | None, batch_norm: str) -> None:
    if consumer is None:
        return
    if consumer not in CONSUMERS:
        raise UsageError(f"--for {consumer} is not known; choose {' or '.join(CONSUMERS)}")
    if name != "qonnx":
        raise UsageError(f"--for {consumer} goes with --format qonnx, not with {name}")
    if consumer == HLS4ML and batch_norm == "keep":
        raise UsageError("--for hls4ml folds BatchNorm into fixed-point multipliers; leave out --batch-norm keep")
    if consumer == HLS4ML and 1 in (spec.weight_bits, spec.act_bits, *(bits for _, bits in spec.layer_bits)):
        raise ExportError(f"{spec.label}: --for hls4ml holds no layers of 1 bit; harden with --bits 2 or more")
    if consumer == HLS4ML and spec.normalisation is not None:
        raise ExportError(
            f"{spec.label}: --for hls4ml takes pixels in [0, 1] as they are; harden without --normalisation"
        )


def build(
    name: str, network: nn.Module, spec: ModelSpec, *, pixels: str = "float", consumer: str | None = None
) -> onnx.ModelProto:
    """The ONNX model of ``network`` in format ``name``, with what it is in metadata_props.

    Args:
        name: a key of :data:`FORMATS`.
        network: folded; for ``qonnx`` with BatchNorm kept, unfolded.
        spec: what it is.
        pixels: ``float`` for an input in [0, 1], ``uint8`` for pixels as they are.
        consumer: one of :data:`CONSUMERS`, for ``qonnx`` alone.

    Raises:
        ExportError: the network has an operator that the format or the consumer cannot hold.
    """
    model = (_qonnx_for_hls4ml if consumer == HLS4ML else FORMATS[name].make)(network, spec)
    if pixels == "uint8":
        uint8_pixels(model)
    if name != "qonnx":  # whose operators the checker does not know
        onnx.checker.check_model(model)
    describe(model, spec, format_name=name, pixels=pixels)
    return model
