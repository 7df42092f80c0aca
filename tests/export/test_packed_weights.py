"""The pass that packs narrow weights, against unpacking by hand and by onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustq.export.lowering.packed_weights import SMALLEST, fields_of, pack, packed_weights, parts_of
from tests.export import hand_made as hm

CODES = {
    1: np.array([-1, 1]),
    2: np.arange(-1, 2),
    3: np.arange(-3, 4),
    4: np.arange(-7, 8),
    5: np.arange(-15, 16),
    7: np.arange(-63, 64),
}
FACTORS = {1: 127, 2: 127, 3: 42, 4: 18, 5: 8, 7: 2}


def weights(bits: int, shape: tuple[int, ...], *, factor: int) -> hm.Array:
    drawn = np.random.default_rng(0).choice(CODES[bits], shape)
    drawn.flat[:2] = CODES[bits][0], CODES[bits][-1]  # both ends, or fewer bits would do
    return (drawn * factor).astype(np.int8)


def layer(codes: hm.Array) -> onnx.ModelProto:
    return hm.model(
        [hm.dequantize("codes", "w", "s"), hm.node("Gemm", ["x", "w"], "y", transB=1)],
        {"codes": codes, "s": np.float32(0.5)},
        x=["n", codes.shape[1]],
        outputs={"y": 2},
    )


@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize("shape", [(64, 16), (33, 37)])  # complete bytes, and a last one to be filled up
def test_the_same_weights_in_so_many_bits(bits: int, shape: tuple[int, int]) -> None:
    codes = weights(bits, shape, factor=1 if shape[0] == 64 else FACTORS[bits])
    # The identity matrix reads the weights out.
    after = hm.lowered(packed_weights, layer(codes), np.eye(shape[1], dtype=np.float32), count=1)
    stored = [tensor for tensor in after.graph.initializer if "packed" in tensor.name]
    held = sum(onnx.numpy_helper.to_array(tensor).size for tensor in stored)
    assert codes.size * bits / 8 <= held < codes.size * bits / 8 + len(stored)
    assert not [tensor for tensor in after.graph.initializer if tensor.name == "codes"]


@pytest.mark.parametrize("bits", [3, 7])
def test_parts_are_added_in_a_type_that_old_onnxruntimes_add(bits: int) -> None:
    model = layer(weights(bits, (64, 16), factor=FACTORS[bits]))
    packed_weights(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    added = [types[name] for node in inferred.node if node.op_type == "Add" for name in node.input]
    assert len(added) == 2 * (len(parts_of(bits)) - 1)
    assert set(added) == {onnx.TensorProto.INT32}  # bytes from 1.23 on


@pytest.mark.parametrize(
    "codes",
    [
        weights(4, (31, 33), factor=1),  # one short of SMALLEST
        np.arange(-128, 128, dtype=np.int8).repeat(8).reshape(64, 32),  # takes 8 bits
    ],
)
def test_what_would_not_shrink_stays(codes: hm.Array) -> None:
    assert codes.size < SMALLEST or np.unique(codes).size == 256
    assert hm.unchanged(packed_weights, layer(codes))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=40))
def test_fields_say_what_the_codes_were(numbers: list[int]) -> None:
    codes = np.array(numbers, np.int8)
    fields = fields_of(codes)
    assert fields.values.max() < 2**fields.bits
    back = fields.factor * (fields.values.astype(int) * fields.stride + fields.offset)
    assert back.tolist() == numbers


def test_the_most_significant_field_comes_first() -> None:
    assert pack(np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], np.uint8), 1).tolist() == [0b10110001, 0b10000000]
    assert pack(np.array([1, 15], np.uint8), 4).tolist() == [0x1F]
