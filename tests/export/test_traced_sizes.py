"""Files of networks with pooling in windows of unequal size, and with windows in the batch axis."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from robustq.data import to_float
from robustq.export.formats import build
from robustq.export.integer_layers import optimised_layers
from robustq.export.parity import parity
from robustq.models.fx.build import quantized_graph
from robustq.models.fx.fold import fold_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import Widths
from robustq.models.spec import ModelSpec
from tests.models.fx.custom_nets import SIDE, pixels
from tests.models.fx.test_tracer import Windows


def pooled(kind: type[nn.Module], size: int) -> nn.Module:
    front = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), kind(size), nn.Conv2d(6, 4, 2), nn.ReLU())
    return nn.Sequential(front, nn.Flatten(), nn.Linear(4 * (size - 1) ** 2, 4))


@pytest.mark.parametrize("name", ["averages", "enlarged averages", "maxima", "windows"])
def test_integer_files_give_the_references_answers(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = {
        "averages": lambda: pooled(nn.AdaptiveAvgPool2d, 3),  # of 5 x 5
        "enlarged averages": lambda: pooled(nn.AdaptiveAvgPool2d, 7),
        "maxima": lambda: pooled(nn.AdaptiveMaxPool2d, 3),
        "windows": Windows,
    }[name]()
    graph = quantized_graph(network, name="net", widths=Widths(4, 4), classes=4, channels=3, image_size=SIDE)
    calibrate(graph, to_float(pixels(seed=7)))
    folded, path = fold_graph(graph), tmp_path / "net.onnx"
    spec = ModelSpec("own:net", 4, 4, 4, 3, SIDE, "data", None, tuple("abcd"))
    onnx.save(build("integer", folded, spec), path)
    found = parity(path, folded, to_float(pixels(100, seed=3)), runs=("optimised", "exact", "unoptimised"))
    assert all(agreement.holds for agreement in found.values()), found
    assert optimised_layers(path).float_convolutions == ()
