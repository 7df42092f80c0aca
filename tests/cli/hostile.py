"""Files that are built to crash, stall or fill the memory of a reader."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from robustq.export.bundle import MODEL, RECORD, write_record

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"

ESCAPES = "\x1b[31mred\x1b[0m\nFAILED \u202egnp.txt"
"""A terminal's colour, a line of its own, and text from right to left."""


def image_folder(folder: Path, *, classes: int = 10, each: int = 5) -> Path:
    """Grey images of 8 pixels, all different."""
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number in range(each):
            pixels = np.full((8, 8), each * label + number, np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def bits_of_one_colour(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    made = io.BytesIO()
    Image.new("1", (side, side)).save(made, "png")
    return made.getvalue()


def zeros(
    path: Path, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], *, most: int | None = None
) -> None:
    """An .npz of zeros, packed two-hundredfold; of at most ``most`` bytes an array, whatever its header says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": kinds[name], "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                left = int(np.prod(shape, dtype=object)) * np.dtype(kinds[name]).itemsize
                left = left if most is None else min(left, most)
                while left > 0:
                    left -= file.write(bytes(min(left, 1 << 24)))


SPLIT_KINDS = {"x_train": "|u1", "y_train": "<i8", "x_test": "|u1", "y_test": "<i8"}


def data_bomb(path: Path, *, images: int, most: int | None = None) -> None:
    """A data set of black images."""
    shapes = {"x_train": (images, 8, 8), "y_train": (images,), "x_test": (10, 8, 8), "y_test": (10,)}
    zeros(path, shapes, SPLIT_KINDS, most=most)


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any],
    *,
    x: Sequence[int | str] = ("n", 1, 8, 8),
    y: Sequence[int | str] = ("n", 10),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Unchecked: from image ``x`` to logits ``y``."""
    made = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info("x", kind, list(x))],
        [helper.make_tensor_value_info("y", kind, list(y))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


WEIGHT = {"w": np.ones((64, 10), np.float32)}


def linear(*nodes: onnx.NodeProto, output: str = "z") -> list[onnx.NodeProto]:
    """One linear layer to ``output``, and more nodes."""
    layers = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], [output])]
    return [*layers, *nodes]


def endless_loop() -> onnx.ModelProto:
    value, goes_on = helper.make_tensor_value_info("v", 1, None), helper.make_tensor_value_info("c", 9, [])
    counter = helper.make_tensor_value_info("i", 7, [])
    ends = [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("v2", 1, None)]
    same = [helper.make_node("Identity", [name], [f"{name}2"]) for name in "cv"]
    body = helper.make_graph(same, "body", [counter, goes_on, value], ends)
    return graph(
        linear(helper.make_node("Loop", ["", "true", "z"], ["y"], body=body)), {**WEIGHT, "true": np.array(True)}
    )


def made_constant(count: int) -> onnx.ModelProto:
    """A constant of ``count`` elements that the graph makes from one number."""
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["z", "sum"], ["y"]),
    ]
    return graph(linear(*nodes), {**WEIGHT, "count": np.array([count], np.int64)})


def expanded(side: int) -> onnx.ModelProto:
    """The same by broadcasting a row and a column."""
    nodes = [
        helper.make_node("Mul", ["row", "column"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["z", "sum"], ["y"]),
    ]
    long = np.zeros(side, np.float32)
    return graph(linear(*nodes), {**WEIGHT, "row": long[None], "column": long[:, None]})


def declared(count: int) -> onnx.ModelProto:
    """A constant that says it has ``count`` elements, and has one."""
    made = graph(linear(helper.make_node("Add", ["z", "big"], ["y"])), WEIGHT)
    made.graph.initializer.append(TensorProto(name="big", dims=[count], data_type=1, raw_data=bytes(4)))
    return made


def elsewhere(place: str) -> onnx.ModelProto:
    """Weights in another file."""
    made = declared(10)
    big = made.graph.initializer[-1]
    big.ClearField("raw_data")
    big.data_location = TensorProto.EXTERNAL
    big.external_data.add(key="location", value=place)
    return made


def padded(by: int) -> onnx.ModelProto:
    """An image with a wide border."""
    nodes = [
        helper.make_node("Pad", ["x", "border"], ["p"]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    border = np.array([0, 0, 0, 0, 0, 0, by, by], np.int64)
    return graph(nodes, {"border": border, "w": np.ones((1, 10), np.float32)})


def wide_windows(pooling: bool) -> onnx.ModelProto:
    """A pooling or a convolution with windows of 2,000 pixels at 2,000 places."""
    side = 2000
    make = helper.make_node("ConstantOfShape", ["sides"], ["kernel"])
    if pooling:
        wide = helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[side, side], pads=[side - 1] * 4)
    else:
        wide = helper.make_node("Conv", ["x", "kernel"], ["p"], pads=[side] * 4)
    nodes = [
        *([] if pooling else [make]),
        wide,
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    sides = {} if pooling else {"sides": np.array([1, 1, side, side], np.int64)}
    return graph(nodes, {**sides, "w": np.ones((1, 10), np.float32)})


def fails_while_running() -> onnx.ModelProto:
    """Its last layer takes values from a place that is not there."""
    made = helper.make_node("Gather", ["z", "places"], ["y"], axis=1, name="last_layer")
    return graph(linear(made), {**WEIGHT, "places": np.full(10, 99)})


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "endless loop": endless_loop,
    "constant of 6 GB": lambda: made_constant(1_500_000_000),
    "constant of 100 GB": lambda: made_constant(25_000_000_000),
    "product of 10 GB": lambda: expanded(50_000),
    "declared 100 GB": lambda: declared(25_000_000_000),
    "weights elsewhere": lambda: elsewhere("/dev/zero"),
    "wide border": lambda: padded(40_000),
    "wide kernel": lambda: wide_windows(pooling=False),
    "wide pooling": lambda: wide_windows(pooling=True),
    "fails while running": fails_while_running,
    "other channels": lambda: graph(linear(output="y"), {"w": np.ones((192, 10), np.float32)}, x=("n", 3, 8, 8)),
    "three classes": lambda: graph(linear(output="y"), {"w": np.ones((64, 3), np.float32)}, y=("n", 3)),
    "one class": lambda: graph(linear(output="y"), {"w": np.ones((64, 1), np.float32)}, y=("n", 1)),
    "no logits": lambda: graph([helper.make_node("Relu", ["x"], ["y"])], {}, y=("n", 1, 8, 8)),
    "double": lambda: graph(linear(output="y"), {"w": np.ones((64, 10))}, kind=TensorProto.DOUBLE),
    "text": lambda: graph([helper.make_node("Identity", ["x"], ["y"])], {}, kind=TensorProto.STRING),
    "batch of four": lambda: graph(linear(output="y"), WEIGHT, x=(4, 1, 8, 8), y=(4, 10)),
}


def edited_bundle(bundle: Path, folder: Path, *, model: bytes | None = None, **entries: Any) -> Path:
    """A copy of an export folder with another .onnx or other entries in bundle.json, whose digests fit."""
    shutil.copytree(bundle, folder)
    (file,) = folder.glob("*.onnx")
    if model is not None:
        file.write_bytes(model)
    record = {**json.loads((folder / RECORD).read_text()), **entries}
    write_record(folder, record, file, folder / MODEL)
    return folder


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda w: w.to_sparse(),
    "compressed": lambda w: w.flatten(1).to_sparse_csr(),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "complex": lambda w: w.to(torch.complex64),
    "without values": lambda w: w.to("meta"),
    "of 256 GB": lambda w: torch.zeros(1).expand(1 << 16, 1 << 10, 1 << 10),
    "of one value": lambda w: torch.zeros(1).expand(w.shape),
}
"""In place of a weight."""

SPECIAL = {"pipe": os.mkfifo, "zeros": lambda path: os.symlink("/dev/zero", path)}
"""Makers of files that are not regular."""


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """Flipped, cut, doubled, zeroed or overwritten."""
    content = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 5, 50))):
        place, length = draw.randrange(len(content)), draw.randrange(1, 200)
        kind = draw.randrange(6)
        if kind == 0:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        elif kind == 3:
            content[place : place + length] = bytes(length)
        elif kind == 4:
            content[place : place + length] = draw.randbytes(length)
        else:
            del content[max(place, 1) :]
        if not content:
            break
    return bytes(content)


def repacked(draw: random.Random, whole: bytes, record: str) -> bytes:
    """The archive with one record damaged and every checksum right: so what is damaged is the content's grammar."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(made, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            after.writestr(entry.filename, damaged(draw, content) if entry.filename.endswith(record) else content)
    return made.getvalue()
