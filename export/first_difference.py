"""The first layer in which a file differs from its network, and by how much.

The file is run with the codes between its layers as further outputs, and these are paired with the network's values by
their order: the exporter writes layers in the order in which the network runs them, and no pass changes it.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.export.binary_qcdq import quantizes
from robustq.export.lowering.graph import GraphIndex
from robustq.export.lowering.requantize import MOVES
from robustq.export.session import OnnxModel

TIE = 1e-3
"""Largest distance, in steps, of a value on a rounding tie: float32 sums of thousands of values up to 255 steps are
right to about 1e-4 of a step."""

SAME = 1e-4
"""Largest difference by float rounding, as a share of the range of a float layer's values."""


@dataclass(frozen=True)
class Difference:
    """The first layer whose values differ from the network's."""

    layer: str  # module name in the network, or ``logits``
    values: int  # that differ
    of: int
    on_ties: bool  # each differs by one step of its quantizer; the network's value is on the boundary of the two

    def __str__(self) -> str:
        return f"{self.values:,} of {self.of:,} values of {self.layer} differ"


@dataclass(frozen=True)
class _Layer:
    """Input and output of one layer of the network."""

    name: str
    entering: Tensor
    output: Tensor
    step: float | None  # of a quantizer of 2 bits or more


@torch.no_grad()
def first_difference(path: Path, network: nn.Module, x: Tensor, *, optimise: bool = False) -> Difference | None:
    """Compare layer by layer on ``x`` (N, C, H, W) float32 in [0, 1]; None where all values agree.

    Quantized networks are compared at their activation quantizers, others at their convolutions and linear layers.

    Args:
        path: an .onnx file that onnxruntime loads, with its optimisations (``optimise``) or without.
        network: its network, on the CPU, in eval mode.
        x: a few images: all values are kept in memory.
    """
    layers, logits = _network_values(network, x)
    values = _file_values(path, x, quantized=any(layer.step is not None for layer in layers), optimise=optimise)
    answers = values.pop()
    if len(values) != len(layers):
        count = f"{len(layers)} layers of the network and {len(values)} of the file do not line up"
        return Difference(f"the file ({count})", 1, 1, on_ties=False)
    for layer, found in zip(layers, values, strict=True):
        different = _differing(layer, found)
        if different.any():
            on_ties = _all_on_ties(layer, found, different)
            return Difference(layer.name, int(different.sum()), different.numel(), on_ties)
    apart = (answers - logits).abs() > SAME * (logits.max() - logits.min())
    return Difference("logits", int(apart.sum()), apart.numel(), on_ties=False) if apart.any() else None


def _network_values(network: nn.Module, x: Tensor) -> tuple[list[_Layer], Tensor]:
    modules = dict(network.named_modules())
    chosen = {name: module for name, module in modules.items() if quantizes(module)}
    chosen = chosen or {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    layers: list[_Layer] = []

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        entering = getattr(inputs[0], "value", inputs[0])
        proxy: Any = getattr(module, "act_quant", None)
        step = float(proxy.scale()) if quantizes(module) and int(proxy.bit_width()) > 1 else None
        layers.append(_Layer(name, entering.clone(), getattr(output, "value", output).clone(), step))

    with ExitStack() as hooks:
        for name, module in chosen.items():
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        logits: Tensor = network(x)
    return layers, logits


def _differing(layer: _Layer, found: Tensor) -> Tensor:
    """Mask of the values that differ, of the layer's shape."""
    if found.shape != layer.output.shape:
        return torch.ones(layer.output.shape, dtype=torch.bool)
    span = float(layer.output.max() - layer.output.min())
    allowed = SAME * span if layer.step is None else layer.step / 2
    return ~((found - layer.output).abs() <= allowed)  # NaN differs


def _all_on_ties(layer: _Layer, found: Tensor, different: Tensor) -> bool:
    if layer.step is None or found.shape != layer.output.shape:
        return False
    one_step = ((found - layer.output).abs() / layer.step)[different] < 1.5
    position = (layer.entering / layer.step)[different]
    on_boundary = (position - position.floor() - 0.5).abs() < TIE
    return bool((one_step & on_boundary).all())


def _file_values(path: Path, x: Tensor, *, quantized: bool, optimise: bool) -> list[Tensor]:
    """The values between the file's layers, in order, and the logits."""
    model = onnx.load(path)
    grids = quantized_values(model) if quantized else {}
    layers = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    names = list(grids) if quantized else layers
    del model.graph.value_info[:]
    known = {value.name for value in [*model.graph.output, *model.graph.input]}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    sources = {value.name for value in model.graph.input}
    wanted = [*(name for name in names if name not in sources), model.graph.output[0].name]
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "values.onnx"
        onnx.save(model, wide)
        found = dict(zip(wanted, OnnxModel(wide, optimise=optimise).values(x, wanted), strict=True))
    found |= {name: (x * 255).round() for name in names if name in sources}  # pixels that enter as uint8
    for name, (scale, zero_point) in grids.items():
        found[name] = (found[name].float() - zero_point) * scale
    return [*(found[name] for name in names), found[wanted[-1]]]


def quantized_values(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Tensors of codes of activation quantizers, each once, in order of execution -> scale and zero point."""
    index = GraphIndex(model.graph)
    found: dict[str, tuple[float, int]] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or _is_constant(index, node.input[0]) or node.input[0] in found:
            continue
        quantizer = index.maker(node)
        if quantizer is not None and quantizer.op_type == "QuantizeLinear" and _repeats(index, quantizer):
            continue
        scale: Any = index.input(node, 1)
        zero_point: Any = index.input(node, 2) if len(node.input) > 2 else 0
        if scale is not None and zero_point is not None and scale.size == 1:
            found[node.input[0]] = float(scale), int(zero_point)
    return found


def _repeats(index: GraphIndex, quantizer: onnx.NodeProto) -> bool:
    """Whether the quantizer is one that the passes of :mod:`robustq.export.lowering.requantize` added."""
    source = index.maker(quantizer)
    if source is not None and source.op_type in MOVES:
        source = index.maker(source)
    if source is None or source.op_type != "DequantizeLinear":
        return False
    before, after = index.input(source, 1), index.input(quantizer, 1)
    return before is not None and after is not None and bool((before == after).all())


def _is_constant(index: GraphIndex, name: str) -> bool:
    """Whether ``name`` depends on no input."""
    waiting, seen = [name], set()  # no recursion: a chain may be longer than Python's stack
    while waiting:
        name = waiting.pop()
        if name in seen or index.constant(name) is not None:
            continue
        seen.add(name)
        maker = index.made_by.get(name)
        if maker is None:
            return False
        waiting += [each for each in maker.input if each]
    return True
