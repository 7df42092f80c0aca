"""Weights narrower than a byte are packed in the file and unpacked by standard operators.

An int8 weight whose codes are multiples, by one number, of values that fit into b < 8 bits becomes bytes that hold as
many b-bit fields as fit, most significant first, and Gather(table, bytes) - Reshape, whose table holds the fields of
each byte. A width that does not divide a byte is the sum of parts that do: 3 bits are 2 bits and 1. The codes that
reach DequantizeLinear are the same. onnxruntime folds operators on constants when it loads a file, so the graph that
runs has whole bytes; its own int4 and int2 types would leave convolutions in float (1.32), and it has no 3- or 1-bit
type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers, insert_nodes

BYTE = 8

SMALLEST = 1024
"""Smaller weights stay as they are: unpacking nodes would take more bytes than they save."""


@dataclass(frozen=True)
class Fields:
    """Integer codes as unsigned fields: code = factor * (field * stride + offset), field < 2^bits."""

    values: NDArray[np.uint8]
    bits: int
    factor: int
    stride: int
    offset: int


def packed_weights(model: onnx.ModelProto) -> int:
    """Pack every such weight; returns how many."""
    graph = model.graph
    index = GraphIndex(graph)
    tables: dict[bytes, str] = {}
    packed = 0
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        codes = index.constant(node.input[0])
        if codes is None or codes.dtype != np.int8 or codes.ndim < 2 or codes.size < SMALLEST:
            continue
        fields = fields_of(codes)
        if fields.bits < BYTE:
            node.input[0] = _unpacked(graph, node, codes.shape, fields, tables)
            packed += 1
    drop_unused_initializers(graph)
    return packed


def fields_of(codes: NDArray[np.int8]) -> Fields:
    """The narrowest fields that hold ``codes`` (any shape, int8)."""
    wide = codes.astype(np.int64)
    factor = max(int(np.gcd.reduce(wide, axis=None)), 1)
    numbers = wide // factor
    lowest, highest = int(numbers.min()), int(numbers.max())
    # Binary codes are two apart, others one.
    stride = max(int(np.gcd.reduce(numbers - lowest, axis=None)), 1)
    bits = max((highest - lowest) // stride, 1).bit_length()
    return Fields(((numbers - lowest) // stride).astype(np.uint8), bits, factor, stride, lowest)


def parts_of(bits: int) -> list[int]:
    """Widths that divide a byte and sum up to ``bits``, widest first: 7 is 4 + 2 + 1."""
    return [width for width in (4, 2, 1) if bits & width]


def pack(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Fields of ``width`` bits (1, 2 or 4), flat, into bytes; the last byte is filled up with zeros."""
    each = BYTE // width
    full = np.zeros(math.ceil(values.size / each) * each, np.uint8)
    full[: values.size] = values.reshape(-1)
    shifts = np.arange(each - 1, -1, -1, dtype=np.uint8) * np.uint8(width)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(full.reshape(-1, each) << shifts, axis=1)
    return packed


def _unpacked(
    graph: onnx.GraphProto, dequantize: onnx.NodeProto, shape: tuple[int, ...], fields: Fields, tables: dict[bytes, str]
) -> str:
    """Insert the unpacking in front of ``dequantize``; returns the tensor of int8 codes."""
    name, size, below = dequantize.name, math.prod(shape), fields.bits
    nodes: list[onnx.NodeProto] = []
    summands = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    wanted = _constant(graph, "shape_" + "x".join(map(str, shape)), np.array(shape, np.int64))
    for place, width in enumerate(parts_of(fields.bits)):
        below -= width
        values = (fields.values >> np.uint8(below)) & np.uint8(2**width - 1)
        content = pack(values, width)
        offset = fields.offset if place == 0 else 0
        table = _table(width, factor=fields.factor * fields.stride * 2**below, offset=fields.factor * offset)
        stored = add_initializer(graph, f"{name}_packed_{width}", content)
        key = table.tobytes() + bytes([width])
        if key not in tables:
            tables[key] = add_initializer(graph, f"bytes_of_{width}", table)
        index = add("Cast", [stored], f"{name}_index_{width}", to=TensorProto.INT32)
        part = add("Gather", [tables[key], index], f"{name}_part_{width}")
        if content.size * (BYTE // width) != size:  # cut the fill of the last byte off
            flat = _constant(graph, "flat", np.array([-1], np.int64))
            start, end = _constant(graph, "start", np.array([0])), _constant(graph, f"end_{size}", np.array([size]))
            part = add("Slice", [add("Reshape", [part, flat], f"{part}_flat"), start, end], f"{part}_cut")
        summands.append(add("Reshape", [part, wanted], f"{name}_shaped_{width}"))
    codes = summands[0]
    if len(summands) > 1:  # in int32, since onnxruntime before 1.23 has no sum of bytes
        wide = [add("Cast", [one], f"{name}_wide_{at}", to=TensorProto.INT32) for at, one in enumerate(summands)]
        codes = wide[0]
        for at in range(1, len(wide)):
            codes = add("Add", [codes, wide[at]], f"{name}_sum_{at}")
        codes = add("Cast", [codes], f"{name}_codes", to=TensorProto.INT8)
    insert_nodes(graph, list(graph.node).index(dequantize), nodes)
    return codes


def _table(width: int, *, factor: int, offset: int) -> NDArray[np.int8]:
    """(256, fields in a byte): the codes of each byte."""
    each = BYTE // width
    shifts = np.arange(each - 1, -1, -1) * width
    fields = (np.arange(256).reshape(-1, 1) >> shifts) & (2**width - 1)
    # Bytes that no weight uses may exceed int8; nobody reads them.
    table: NDArray[np.int8] = np.clip(fields * factor + offset, -128, 127).astype(np.int8)
    return table


def _constant(graph: onnx.GraphProto, name: str, values: NDArray[np.int64]) -> str:
    """Add a constant that all weights share."""
    if any(tensor.name == name for tensor in graph.initializer):
        return name
    return add_initializer(graph, name, values)
