"""Weights narrower than a byte are packed in the file and unpacked by standard operations.

Contract: an int8 weight behind a DequantizeLinear whose codes are multiples, by one number, of values that fit into b <
8 bits becomes bytes that hold as many b-bit fields as fit, most significant first, and Gather(table, bytes) - Reshape,
whose table holds what each byte unpacks to. A width that does not divide a byte is the sum of parts that do, added as
int32: 3 bits are 2 bits and 1. The codes that reach DequantizeLinear are the same. Why: onnxruntime folds operations on
constants when it loads a file, so the graph that runs is the one with whole bytes; its own int4 and int2 types would
leave convolutions in float (1.32), and there is no 3- or 1-bit type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

BYTE = 8

SMALLEST = 1024
"""Weights fewer than this stay as they are: unpacking nodes would take more bytes than they save."""


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
        codes: NDArray[Any] | None = index.constant(node.input[0])
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
    # Signs are two values two apart; everything else counts in ones.
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
    """Put the unpacking in front of ``dequantize``; the name of the tensor of whole codes."""
    name = dequantize.name
    size = math.prod(shape)
    nodes: list[onnx.NodeProto] = []
    summands = []
    below = fields.bits
    widths = parts_of(fields.bits)
    wanted = _constant(graph, "shape_" + "x".join(map(str, shape)), np.array(shape, np.int64))
    for place, width in enumerate(widths):
        below -= width
        values = (fields.values >> np.uint8(below)) & np.uint8(2**width - 1)
        content = pack(values, width)
        offset = fields.offset if place == 0 else 0
        table = _table(width, factor=fields.factor * fields.stride * 2**below, offset=fields.factor * offset)
        stored = add_initializer(graph, f"{name}_packed_{width}", content)
        key = table.tobytes() + bytes([width])
        if key not in tables:
            tables[key] = add_initializer(graph, f"bytes_of_{width}", table)
        index_name, part = f"{name}_index_{width}", f"{name}_part_{width}"
        nodes.append(helper.make_node("Cast", [stored], [index_name], to=TensorProto.INT32))
        nodes.append(helper.make_node("Gather", [tables[key], index_name], [part]))
        if content.size * (BYTE // width) != size:
            part = _cut(graph, nodes, part, size)
        nodes.append(helper.make_node("Reshape", [part, wanted], [f"{name}_shaped_{width}"]))
        summands.append(f"{name}_shaped_{width}")
    codes = summands[0] if len(summands) == 1 else _sum(nodes, name, summands)
    position = list(graph.node).index(dequantize)
    for step, node in enumerate(nodes):
        graph.node.insert(position + step, node)
    return codes


def _sum(nodes: list[onnx.NodeProto], name: str, summands: list[str]) -> str:
    """In int32, since onnxruntime before 1.23 has no sum of bytes."""
    for place, summand in enumerate(summands):
        nodes.append(helper.make_node("Cast", [summand], [f"{name}_wide_{place}"], to=TensorProto.INT32))
    whole = f"{name}_wide_0"
    for place in range(1, len(summands)):
        nodes.append(helper.make_node("Add", [whole, f"{name}_wide_{place}"], [f"{name}_sum_{place}"]))
        whole = f"{name}_sum_{place}"
    nodes.append(helper.make_node("Cast", [whole], [f"{name}_codes"], to=TensorProto.INT8))
    return f"{name}_codes"


def _cut(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], part: str, size: int) -> str:
    """Flat, and without what filled up the last byte."""
    flat = _constant(graph, "flat", np.array([-1], np.int64))
    start, end = _constant(graph, "start", np.array([0], np.int64)), _constant(graph, f"end_{size}", np.array([size]))
    nodes.append(helper.make_node("Reshape", [part, flat], [f"{part}_flat"]))
    nodes.append(helper.make_node("Slice", [f"{part}_flat", start, end], [f"{part}_cut"]))
    return f"{part}_cut"


def _table(width: int, *, factor: int, offset: int) -> NDArray[np.int8]:
    """(256, fields in a byte): what each byte unpacks to."""
    each = BYTE // width
    shifts = np.arange(each - 1, -1, -1) * width
    fields = (np.arange(256).reshape(-1, 1) >> shifts) & (2**width - 1)
    # A byte whose fields no weight has may unpack to what int8 cannot hold; nobody reads it.
    table: NDArray[np.int8] = np.clip(fields * factor + offset, -128, 127).astype(np.int8)
    return table


def _constant(graph: onnx.GraphProto, name: str, values: NDArray[np.int64]) -> str:
    """One constant for all weights that want it."""
    if any(tensor.name == name for tensor in graph.initializer):
        return name
    return add_initializer(graph, name, values)
