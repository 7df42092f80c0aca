"""The first layer in which a file differs from its network, and by how much.

The file is run with the codes between its layers as further outputs, and these are paired with the network's values by
their order: the exporter writes layers in the order in which the network runs them, and no pass changes it. Where two
quantizers of the network do the same, the exporter may write one; a layer of another scale or shape than the next
values of the file is left out.

Each layer of the network computes from the file's values of the layers before it. A code that another layer rounded the
other way is thus no difference of the layers behind it, and hides none of theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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


SAME_SCALE = 1e-5
"""Largest relative difference of a scale in the file and in the network."""


@dataclass(frozen=True)
class Difference:
    """The first layer whose values differ from the network's, by more than rounding ties."""

    layer: str  # module name in the network, or ``logits``
    values: int  # that differ
    of: int

    def __str__(self) -> str:
        return f"{self.values:,} of {self.of:,} values of {self.layer} differ"


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison layer by layer."""

    fault: Difference | None  # None: all values agree, or differ on rounding ties
    on_ties: int  # values before it that differ by one step, where the network's is on the boundary of the two


@torch.no_grad()
def compare_layers(path: Path, network: nn.Module, x: Tensor, *, optimise: bool = False) -> Comparison:
    """Compare layer by layer on ``x`` (N, C, H, W) float32 in [0, 1], image by image until one shows a fault.

    Quantized networks are compared at their activation quantizers, others at their convolutions and linear layers, and
    both at their logits.

    Args:
        path: an .onnx file that onnxruntime loads, with its optimisations (``optimise``) or without.
        network: its network, on the CPU, in eval mode.
        x: a few images.
    """
    modules = dict(network.named_modules())
    quantizers = {name: module for name, module in modules.items() if quantizes(module)}
    layers = quantizers or {name: each for name, each in modules.items() if isinstance(each, nn.Conv2d | nn.Linear)}
    on_ties = 0
    with _FileValues(path, quantized=bool(quantizers), optimise=optimise) as values_of:
        for image in torch.split(x, 1):
            found = _compare_one(layers, network, values_of(image), image)
            on_ties += found.on_ties
            if found.fault is not None:
                return Comparison(found.fault, on_ties)
    return Comparison(None, on_ties)


def _compare_one(layers: dict[str, nn.Module], network: nn.Module, file: list[_Values], x: Tensor) -> Comparison:
    """Compare with the values of the file, in order, the logits last."""
    answers = file.pop().values
    faults: list[Difference] = []
    calls = paired = on_ties = 0

    def compare(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls, paired, on_ties
        calls += 1
        value = getattr(output, "value", output)
        if paired == len(file) or not file[paired].may_be_of(module, value):
            return None
        found = file[paired].values
        paired += 1
        step = float(module.act_quant.scale()) if _has_steps(module) else None  # type: ignore[operator,union-attr]
        different = _differing(found, value, step)
        if different.any():
            if _all_on_ties(found, value, getattr(inputs[0], "value", inputs[0]), step, different):
                on_ties += int(different.sum())
            elif not faults:
                faults.append(Difference(name, int(different.sum()), different.numel()))
        return output.set(value=found) if hasattr(output, "value") else found

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(module.register_forward_hook(partial(compare, name)))
        logits: Tensor = network(x)
    if paired != len(file):
        count = f"{calls} layers of the network and {len(file)} of the file do not line up"
        return Comparison(Difference(f"the file ({count})", 1, 1), 0)
    apart = ~((answers - logits).abs() <= SAME * (logits.max() - logits.min()))
    if not faults and apart.any():
        faults.append(Difference("logits", int(apart.sum()), apart.numel()))
    return Comparison(faults[0] if faults else None, on_ties)


def _has_steps(module: nn.Module) -> bool:
    """Whether the layer is a quantizer of 2 bits or more."""
    proxy: Any = getattr(module, "act_quant", None)
    return quantizes(module) and int(proxy.bit_width()) > 1


def _differing(found: Tensor, value: Tensor, step: float | None) -> Tensor:
    """Mask of the values that differ, of the shape of the network's ``value``."""
    allowed = SAME * float(value.max() - value.min()) if step is None else step / 2
    return ~((found - value).abs() <= allowed)  # NaN differs


def _all_on_ties(found: Tensor, value: Tensor, entering: Tensor, step: float | None, different: Tensor) -> bool:
    if step is None:
        return False
    one_step = ((found - value).abs() / step)[different] < 1.5
    position = (entering / step)[different]
    on_boundary = (position - position.floor() - 0.5).abs() < TIE
    return bool((one_step & on_boundary).all())


@dataclass(frozen=True)
class _Values:
    """Values between two layers of a file."""

    values: Tensor
    scale: float | None = None  # of codes

    def may_be_of(self, module: nn.Module, value: Tensor) -> bool:
        """Whether shape and scale are those of a layer of the network and its output."""
        proxy: Any = getattr(module, "act_quant", None)
        scales = self.scale is None or abs(float(proxy.scale()) / self.scale - 1) < SAME_SCALE
        return scales and self.values.shape == value.shape


class _FileValues:
    """The values between a file's layers, in order, and the logits; a context manager."""

    def __init__(self, path: Path, *, quantized: bool, optimise: bool) -> None:
        model = onnx.load(path)
        self.grids = quantized_values(model) if quantized else {}
        layers = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        self.names = list(self.grids) if quantized else layers
        del model.graph.value_info[:]
        known = {value.name for value in [*model.graph.output, *model.graph.input]}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names if name not in known)
        self.sources = {value.name for value in model.graph.input}
        self.wanted = [*(name for name in self.names if name not in self.sources), model.graph.output[0].name]
        self.folder = tempfile.TemporaryDirectory()
        wide = Path(self.folder.name) / "values.onnx"
        onnx.save(model, wide)
        self.session = OnnxModel(wide, optimise=optimise)

    def __enter__(self) -> Callable[[Tensor], list[_Values]]:
        return self._run

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def _run(self, x: Tensor) -> list[_Values]:
        found = dict(zip(self.wanted, self.session.values(x, self.wanted), strict=True))
        found |= {name: (x * 255).round() for name in self.names if name in self.sources}  # pixels that enter as uint8
        logits = _Values(found[self.wanted[-1]])
        if not self.grids:
            return [*(_Values(found[name]) for name in self.names), logits]
        grids = self.grids.items()
        return [*(_Values((found[name].float() - zero) * scale, scale) for name, (scale, zero) in grids), logits]


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
