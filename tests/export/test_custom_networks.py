"""Files of custom networks: the same answers, integer layers, and the expected float layers."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import to_float
from robustq.export.formats import build
from robustq.export.integer_layers import optimised_layers
from robustq.export.parity import Agreement, compare, logits_of, parity
from robustq.export.qonnx_file import execute
from robustq.export.session import OnnxModel
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import Widths
from robustq.models.spec import ModelSpec
from tests.models.fx.custom_nets import CLASSES, NETS, SIDE, folded_of, pixels

X = to_float(pixels(100, seed=3))

FLOAT_LAYERS = {
    "tutorial": {"LogSoftmax"},
    "normalising": {"Sub", "Div"},  # the normalisation, in front of the input quantizer
    "inverted": set(),
    "branching": {"BatchNormalization"},  # behind a concatenation there is no layer to fold it into
    # Hard swish is two of them; the pooling gives the logits, behind which nothing is quantized.
    "gated": {"HardSigmoid", "Mul", "Sigmoid", "GlobalAveragePool"},
    "splitting": set(),
}

WITHOUT_SUMS = {"tutorial", "gated", "splitting"}
"""onnxruntime adds quantized values in float32: there a sum on a rounding boundary may fall on its other side."""


def spec(bits: int) -> ModelSpec:
    return ModelSpec("own:net", bits, bits, CLASSES, 3, SIDE, "data", None, tuple("abcde"))


@functools.cache
def content(name: str, bits: int, format_name: str) -> bytes:
    made: bytes = build(format_name, folded_of(name, bits), spec(bits)).SerializeToString()
    return made


def written(folder: Path, name: str, bits: int, format_name: str) -> Path:
    path = folder / f"{name}-{bits}-{format_name}.onnx"
    path.write_bytes(content(name, bits, format_name))
    return path


def holds_exactly(agreement: Agreement) -> bool:
    """The reference sums integers as the file does; one float32 product a logit remains."""
    return agreement.different_top1 == 0 and agreement.max_difference < 1e-6


@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in sorted(NETS)), ("inverted", 2), ("splitting", 8)])
def test_integer_files_give_the_references_answers(tmp_path: Path, name: str, bits: int) -> None:
    path, folded = written(tmp_path, name, bits, "integer"), folded_of(name, bits)
    found = parity(path, folded, X, runs=("optimised", "exact", "unoptimised"))
    assert all(agreement.holds for agreement in found.values())
    if name in WITHOUT_SUMS:
        assert holds_exactly(found["optimised"]) and holds_exactly(found["exact"])
    for arm in (False, True):
        layers = optimised_layers(path, arm_defaults=arm)
        assert layers.float_convolutions == ()
        assert {layer.split("/")[-1].split("(")[0].split("_")[0] for layer in layers.in_float} == FLOAT_LAYERS[name]
        assert len(layers.integer) >= sum(isinstance(one, nn.Conv2d) for one in folded.modules())


@pytest.mark.parametrize("name", ["tutorial", "inverted"])
def test_qcdq_files(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, 4, "qcdq")
    found = parity(path, folded_of(name, 4), X, runs=("optimised", "unoptimised"))
    assert all(agreement.holds for agreement in found.values())


def test_qonnx_files() -> None:
    few = X[:8]  # seconds each
    answers = execute(onnx.load_from_string(content("inverted", 4, "qonnx")), few)
    assert compare(logits_of(folded_of("inverted", 4), few, label="reference"), answers).max_difference < 1e-5


def test_uint8_pixels_are_divided_before_a_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "uint8.onnx"
    onnx.save(build("packed", folded_of("normalising", 4), spec(4), pixels="uint8"), path)
    model = OnnxModel(path)
    assert model.takes_uint8
    assert torch.equal(model(X[:20]), OnnxModel(written(tmp_path, "normalising", 4, "integer"))(X[:20]))


class Windows(nn.Module):
    """Paddings and windows that runtimes count differently; a part called act whose values are quantized; a layer of
    zeros, whose channels are nothing but their biases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, padding="same", bias=False)
        self.even = nn.Conv2d(8, 8, (2, 3), padding="same", dilation=(3, 2))
        self.mean = nn.AvgPool2d(3, 2, 1, ceil_mode=True)  # 12 -> 7
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.max = nn.MaxPool2d(2, 2, 1, ceil_mode=True)  # 8 -> 5
        self.block = nn.Sequential()
        self.block.act = nn.Hardswish()
        self.halved = nn.AvgPool2d(2, 3, ceil_mode=True)  # 5 -> 2
        self.zeros = nn.Conv2d(8, 8, 1)
        nn.init.zeros_(self.zeros.weight)
        self.last = nn.Conv2d(16, 8, 2, padding="valid")
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mean(self.even(self.stem(x).relu()).relu())
        x = self.halved(self.block(self.max(self.pad(x))))
        x = torch.cat([x, self.zeros(x).relu()], dim=1)
        logits: Tensor = self.fc(self.last(x).flatten(1))
        return logits


class Moves(nn.Module):
    """Operations that ONNX lacks and others stand for, and a first convolution that does not take the images."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.squares = nn.PixelUnshuffle(2)
        self.stem = nn.Conv2d(12, 8, 1)
        self.shuffle = nn.ChannelShuffle(2)
        self.register_buffer("position", torch.linspace(-1, 1, 6).expand(1, 8, 6, 6).clone())
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.max = nn.AdaptiveMaxPool2d(3)
        self.fc = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(self.stem(self.squares(x)).relu()) + self.position.expand(x.shape[0], -1, -1, -1)
        x = functional.channel_shuffle(self.groups(x).relu(), 4)
        logits: Tensor = self.fc(self.max(x).flatten(1))
        return logits


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("kind", [Windows, Moves])
def test_unusual_operations_are_the_same_everywhere(tmp_path: Path, kind: type[nn.Module], bits: int) -> None:
    torch.manual_seed(0)
    what = spec(bits)
    graph = quantized_graph(
        kind().eval(), name="net", widths=Widths(bits, bits), classes=CLASSES, channels=3, image_size=SIDE
    )
    calibrate(graph, X)
    folded = fold(graph, what)
    for format_name in ("integer", "qcdq") if bits == 4 else ("float",):
        path = tmp_path / f"{format_name}.onnx"
        model = build(format_name, folded, what)
        assert all(one.name != "auto_pad" for node in model.graph.node for one in node.attribute)
        onnx.save(model, path)
        found = parity(path, folded, X, runs=("optimised", "exact", "unoptimised"))
        assert all(agreement.holds for agreement in found.values())
        if format_name != "qcdq":
            assert holds_exactly(found["optimised"]) and holds_exactly(found["exact"])
        if format_name == "integer":
            layers = optimised_layers(path)
            assert layers.float_convolutions == () and {"AveragePool"}.isdisjoint(layers.in_float)
