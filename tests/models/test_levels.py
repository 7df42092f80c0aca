"""How many values a quantized tensor takes, over random shapes, widths and contents."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustq.models.layers import Layers
from robustq.models.quant.quantizers import Widths

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
BITS = st.sampled_from([8, 4, 3, 2, 1])


def contents(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return {
        "normal": x,
        "heavy": x**5,
        "tiny": x * 1e-20,
        "huge": x * 1e20,
        "sparse": x * (torch.rand(shape, generator=generator) < 0.1),
        "zero": x * 0.0,
        "equal": torch.ones(shape) * 0.3,
    }[kind]


KINDS = st.sampled_from(["normal", "heavy", "tiny", "huge", "sparse", "zero", "equal"])


@SETTINGS
@given(
    bits=BITS, kind=KINDS, out=st.integers(1, 6), into=st.integers(1, 6), kernel=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_weights(bits: int, kind: str, out: int, into: int, kernel: int, seed: int) -> None:
    conv: Any = Layers(Widths(bits, 4)).conv(into, out, kernel_size=kernel)
    with torch.no_grad():
        conv.weight.copy_(contents(kind, (out, into, kernel, kernel), seed))
    quantized = conv.quant_weight()
    allowed = 2 if bits == 1 else 2**bits - 1
    assert quantized.value.isfinite().all()
    for values, codes in zip(quantized.value, quantized.int(), strict=True):
        assert len(values.unique()) <= allowed
        assert codes.abs().max() <= max(2 ** (bits - 1) - 1, 1)


@SETTINGS
@given(
    bits=BITS, kind=KINDS, shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    threshold=st.floats(1e-3, 1e3), seed=st.integers(0, 999),
)  # fmt: skip
def test_activations(bits: int, kind: str, shape: tuple[int, ...], threshold: float, seed: int) -> None:
    layers = Layers(Widths(4, bits))
    layer: Any = layers.sign() if bits == 1 else layers.relu()
    if bits > 1:
        layer.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.set_threshold(threshold)
    y = layer(contents(kind, shape, seed))
    assert y.isfinite().all() and y.shape == shape
    assert len(y.unique()) <= 2**bits
    assert y.min() >= (-1 if bits == 1 else 0)
