"""QONNX for hls4ml: integer activations, and one fixed-point multiplication per tensor and channel for the scales.

Takes the QONNX graph of a folded network. Afterwards every Quant on activations and weights has scale 1; biases and
multipliers are constants behind a Quant with a power of two as scale, whose rounding moves a value that enters a
quantizer by at most 2^-FRACTION of its step, and a logit by as much of the logits' bound. A ReLU in front of an
unsigned quantizer goes; linear layers and global average pooling become convolutions. The graph takes one image
(1, C, H, W) at a time and is channels-last; all shapes are annotated. Other operators are refused by name.

hls4ml (1.3.0) computes other scales, averages and the biases of linear layers in its configured default type. It takes
the type of a constant from its Quant, and infers every other type wide enough. It reads channels-last layers and
annotated shapes only; qonnx' conversion to that layout takes minutes, and leaves multipliers that hls4ml cannot
broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, add_initializer, attributes, drop_unused_initializers

FRACTION = 16
"""Measured on 100 digits at 4 bits: with 12, five images get other logits (one code differs); with 16, none."""

CHANNELS_LAST = "qonnx.custom_op.channels_last"
"""Domain of channels-last convolutions and pooling; weights are (O, H, W, I)."""

Floats = NDArray[np.float64]
Shape = tuple[int, int, int]  # (C, H, W)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the new graph."""

    name: str  # in the new graph
    step: Floats  # value of one integer step, () or (C,) float64; 1 where it holds the values themselves
    largest: Floats  # bound of the magnitudes, in steps, () or (C,) float64
    shape: Shape  # without the batch axis


def fixed_point_multipliers(model: onnx.ModelProto) -> None:
    """Rewrite ``model``; ExportError for an operator that hls4ml cannot hold."""
    _Rewriting(model.graph).run()
    del model.graph.quantization_annotation[:]
    model.opset_import.append(helper.make_opsetid(CHANNELS_LAST, model.opset_import[0].version))


class _Rewriting:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph, self.index = graph, GraphIndex(graph)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, _Tensor] = {}
        self.shapes: dict[str, Sequence[int]] = {}

    def run(self) -> None:
        known: dict[str, Callable[[onnx.NodeProto], _Tensor]] = {
            "Quant": self._quantize,
            "Conv": self._convolve,
            "Gemm": self._convolve,
            "Relu": self._relu,
            "MaxPool": self._pool_maximum,
            "GlobalAveragePool": self._pool_average,
            "Add": self._add,
            "Flatten": lambda node: self.tensors[node.input[0]],  # tensors keep their pixels
        }
        self._begin()
        for node in self.graph.node:
            if node.op_type == "Quant" and self.index.constant(node.input[0]) is not None:
                continue  # a weight or bias, written with its layer
            if node.op_type not in known:
                raise _refused(node, f"is none of {', '.join(known)}")
            self.tensors[node.output[0]] = known[node.op_type](node)
        self._end(self.tensors[self.graph.output[0].name])
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        drop_unused_initializers(self.graph)
        self._annotate()

    def _begin(self) -> None:
        (source,) = self.graph.input
        channels, height, width = (axis.dim_value for axis in source.type.tensor_type.shape.dim[1:])
        one = np.array(1.0)
        images = _Tensor("images_channels_last", one, one, (channels, height, width))
        self._emit("Transpose", [source.name], images.name, _pixels_first(images.shape), perm=[0, 2, 3, 1])
        self.tensors[source.name] = images
        for value in (source, self.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    def _end(self, logits: _Tensor) -> None:
        # A Flatten at the end is a KeyError of hls4ml's io_stream.
        flat = replace(logits, name="flat_logits")
        self._emit("Flatten", [logits.name], flat.name, (1, logits.shape[0]), axis=1)
        tolerance = float(np.max(logits.step * logits.largest)) * 2.0**-FRACTION
        self._multiply(flat, logits.step, logits.largest, tolerance, name="logits")
        self.nodes[-1].output[0] = self.graph.output[0].name

    def _annotate(self) -> None:
        self.shapes |= {tensor.name: tensor.dims for tensor in self.graph.initializer}
        given = {value.name for value in [*self.graph.input, *self.graph.output]}
        del self.graph.value_info[:]
        self.graph.value_info.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.shapes.items()
            if name not in given
        )

    def _quantize(self, node: onnx.NodeProto) -> _Tensor:
        scale, zero_point, bits = (self._constant(node, place) for place in (1, 2, 3))
        if zero_point.any() or scale.size != 1:
            raise _refused(node, "has a zero point or several scales")
        x, signed, step = self.tensors[node.input[0]], bool(attributes(node)["signed"]), scale.reshape(())
        width = int(bits.flat[0])
        largest = 2.0 ** (width - 1) if signed else 2.0**width - 1
        factor = x.step / step
        # Values beyond twice the largest code are clipped whatever the rounding of the multiplier.
        span = np.minimum(x.largest, 2 * largest / factor)
        entering = self._multiply(x, factor, span, 2.0**-FRACTION, name=node.name)
        narrow, name = bool(attributes(node)["narrow"]), f"{node.name}_codes"
        self._emit_quantizer(entering.name, name, 1.0, width, _pixels_first(x.shape), signed=signed, narrow=narrow)
        return _Tensor(name, step, np.array(largest), x.shape)

    def _convolve(self, node: onnx.NodeProto) -> _Tensor:
        x, weight = self.tensors[node.input[0]], self.index.made_by.get(node.input[1])
        if weight is None or weight.op_type != "Quant" or x.step.ndim:
            raise _refused(node, "meets weights or activations that are not quantized")
        values, scale, bits = (self._constant(weight, place) for place in (0, 1, 3))
        codes = np.rint(values / scale)
        if node.op_type == "Gemm":
            codes = codes.reshape(-1, *x.shape)  # a convolution of all pixels
        group = attributes(node).get("group", 1)
        if group > 1 and not group == x.shape[0] == len(codes):
            raise _refused(node, f"has {group} groups; hls4ml takes convolutions of one, and depthwise ones")
        step = np.broadcast_to(x.step * scale.reshape(-1), len(codes))
        sums = x.largest * np.abs(codes).reshape(len(codes), -1).sum(axis=1)
        bias = self._bias(node)
        counts = (sums > 0) | (bias != 0)
        step = np.where(counts, step, step[counts].min(initial=1.0))  # the scale of a dead channel has no meaning
        width, narrow = int(bits.flat[0]), bool(attributes(weight)["narrow"])
        inputs = [x.name, self._quantized_codes(f"{node.name}_weight", codes, width, signed=True, narrow=narrow)]
        if bias.any():
            # In steps of the accumulator, and fine enough for the next quantizer.
            coarsest = float(step.max())
            places = FRACTION + max(_exponent(coarsest / self._next_step(node.output[0], coarsest)), 0)
            inputs.append(self._fixed_point(f"{node.name}_bias", bias / step, places, signed=True))
        shape = self._emit_convolution(node, inputs, codes.shape, x.shape, group)
        return _Tensor(f"{node.name}_sums", step, sums + np.abs(bias) / step, shape)

    def _pool_average(self, node: onnx.NodeProto) -> _Tensor:
        """A depthwise convolution of ones: the exact sum."""
        x = self.tensors[node.input[0]]
        channels, height, width = x.shape
        ones = np.ones((channels, 1, height, width))
        inputs = [x.name, self._quantized_codes(f"{node.name}_weight", ones, 1, signed=False)]
        shape = self._emit_convolution(node, inputs, ones.shape, x.shape, channels)
        pixels = height * width
        return _Tensor(f"{node.name}_sums", x.step / pixels, x.largest * pixels, shape)

    def _relu(self, node: onnx.NodeProto) -> _Tensor:
        x = self.tensors[node.input[0]]
        if all(one.op_type == "Quant" and not attributes(one)["signed"] for one in self.index.used_by[node.output[0]]):
            return x
        self._emit("Relu", [x.name], f"{node.name}_positive", _pixels_first(x.shape))
        return replace(x, name=f"{node.name}_positive")

    def _pool_maximum(self, node: onnx.NodeProto) -> _Tensor:
        x, given = self.tensors[node.input[0]], attributes(node)
        if any(given.get("pads", ())) or given.get("ceil_mode") or any(one != 1 for one in given.get("dilations", ())):
            raise _refused(node, "is padded, dilated or rounds its size up")
        kernel, strides = given["kernel_shape"], given.get("strides", [1, 1])
        shape = _window_positions(x.shape, kernel, [0, 0, 0, 0], strides)
        name = f"{node.name}_largest"
        options = {"kernel_shape": kernel, "pads": [0, 0, 0, 0], "strides": strides, "dilations": [1, 1]}
        self._emit("MaxPool", [x.name], name, _pixels_first(shape), domain=CHANNELS_LAST, **options)
        return _Tensor(name, x.step, x.largest, shape)

    def _add(self, node: onnx.NodeProto) -> _Tensor:
        terms = [self.tensors[name] for name in node.input if name in self.tensors]
        if len(terms) != 2 or terms[0].shape != terms[1].shape:
            raise _refused(node, "adds a constant, or tensors of two shapes")
        a, b = terms
        if a.step.ndim or b.step.ndim or a.step != b.step:
            step = np.array(self._next_step(node.output[0], float(np.max(a.step))))
            a, b = (
                self._multiply(x, x.step / step, x.largest, 2.0**-FRACTION, name=f"{node.name}_{side}")
                for side, x in (("a", a), ("b", b))
            )
        self._emit("Add", [a.name, b.name], f"{node.name}_sum", _pixels_first(a.shape))
        return _Tensor(f"{node.name}_sum", a.step, a.largest + b.largest, a.shape)

    def _bias(self, node: onnx.NodeProto) -> Floats:
        """The quantized biases (C,), or a 0."""
        if len(node.input) < 3:
            return np.zeros(1)
        maker = self.index.made_by.get(node.input[2])
        if maker is None or maker.op_type != "Quant":
            raise _refused(node, "has a bias that is not quantized")
        values, scale = (self._constant(maker, place) for place in (0, 1))
        return np.asarray(np.rint(values / scale) * scale, dtype=np.float64)

    def _next_step(self, name: str, otherwise: float) -> float:
        """Step of the next quantizer behind tensor ``name``."""
        while readers := self.index.used_by[name]:
            if readers[0].op_type == "Quant":
                return float(self._constant(readers[0], 1).flat[0])
            name = readers[0].output[0]
        return otherwise

    def _constant(self, node: onnx.NodeProto, place: int) -> Floats:
        found = self.index.constant(node.input[place])
        if found is None:
            raise _refused(node, "has parameters that are computed")
        return np.asarray(found, dtype=np.float64)

    def _multiply(self, x: _Tensor, factor: Floats, span: Floats, tolerance: float, *, name: str) -> _Tensor:
        """``x`` times ``factor``, with an error of at most ``tolerance`` for codes up to ``span``."""
        places = _exponent(float(np.max(span)) / tolerance) - 1  # the rounding error is half a place
        if (np.rint(factor * 2.0**places) == 2.0**places).all():
            # hls4ml (1.3.0) drops a product by 1 together with the quantizer behind it.
            return replace(x, step=x.step / factor)
        multiplier = self._fixed_point(f"{name}_multiplier", factor, places, signed=False)
        self._emit("Mul", [x.name, multiplier], f"{name}_product", self.shapes[x.name])
        return _Tensor(f"{name}_product", x.step / factor, x.largest * factor, x.shape)

    def _fixed_point(self, name: str, values: Floats, places: int, *, signed: bool) -> str:
        codes = np.rint(values * 2.0**places)
        width = max(int(np.abs(codes).max()).bit_length(), 1) + signed
        constant = add_initializer(self.graph, name, (codes * 2.0**-places).astype(np.float32))
        return self._emit_quantizer(constant, f"{name}_fixed", 2.0**-places, width, values.shape, signed=signed)

    def _quantized_codes(self, name: str, codes: Floats, width: int, *, signed: bool, narrow: bool = False) -> str:
        """Weights (O, I, H, W) behind a Quant, as (O, H, W, I)."""
        moved = np.ascontiguousarray(codes.transpose(0, 2, 3, 1), dtype=np.float32)
        constant = add_initializer(self.graph, f"{name}_codes", moved)
        return self._emit_quantizer(constant, name, 1.0, width, moved.shape, signed=signed, narrow=narrow)

    def _emit(self, kind: str, inputs: Sequence[str], output: str, shape: Sequence[int], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        self.shapes[output] = shape

    def _emit_quantizer(
        self, x: str, output: str, scale: float, width: int, shape: Sequence[int], *, signed: bool, narrow: bool = False
    ) -> str:
        parameters = (("scale", scale), ("zero_point", 0.0), ("width", width))
        inputs = [add_initializer(self.graph, f"{output}_{what}", np.array(it, np.float32)) for what, it in parameters]
        options: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        self._emit("Quant", [x, *inputs], output, shape, domain="qonnx.custom_op.general", **options)
        return output

    def _emit_convolution(
        self, node: onnx.NodeProto, inputs: Sequence[str], weight: Sequence[int], entering: Shape, group: int
    ) -> Shape:
        given = attributes(node)
        if given.get("auto_pad", b"NOTSET") != b"NOTSET" or any(one != 1 for one in given.get("dilations", ())):
            raise _refused(node, "is padded by auto_pad or dilated")
        pads, strides = given.get("pads", [0, 0, 0, 0]), given.get("strides", [1, 1])
        kernel = list(weight[2:])
        _, height, width = _window_positions(entering, kernel, pads, strides)
        shape = (weight[0], height, width)
        options = {"kernel_shape": kernel, "pads": pads, "strides": strides, "dilations": [1, 1], "group": group}
        self._emit("Conv", inputs, f"{node.name}_sums", _pixels_first(shape), domain=CHANNELS_LAST, **options)
        return shape


def _pixels_first(shape: Shape) -> tuple[int, int, int, int]:
    channels, height, width = shape
    return (1, height, width, channels)


def _window_positions(entering: Shape, kernel: list[int], pads: list[int], strides: list[int]) -> Shape:
    """(C, H, W) of the positions of a window that moves over ``entering``."""
    height, width = (
        (side + pads[axis] + pads[axis + 2] - kernel[axis]) // strides[axis] + 1
        for axis, side in enumerate(entering[1:])
    )
    return (entering[0], height, width)


def _exponent(value: float) -> int:
    """The smallest e with 2^e of at least ``value``."""
    return int(np.ceil(np.log2(max(value, 1e-30))))


def _refused(node: onnx.NodeProto, why: str) -> ExportError:
    return ExportError(
        f"hls4ml cannot hold {node.name} ({node.op_type}), which {why}; write the network with --format integer"
    )
