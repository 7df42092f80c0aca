"""The search for the layer in which a file parts from its network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.export.first_difference import Difference, first_difference
from robustq.export.parity import APART, RUNS, compare
from robustq.export.session import OnnxModel
from tests.export.exported import net, written


@pytest.mark.parametrize(("bits", "name"), [(32, "float"), (4, "qcdq"), (4, "packed"), (1, "qcdq"), (1, "packed")])
def test_a_faithful_file_differs_nowhere(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    assert first_difference(written(tmp_path, bits, name), made.folded, made.x[:8]) is None


@pytest.mark.parametrize(
    ("bits", "layer"), [(32, "layer2.0.conv2"), (4, "conv1"), (4, "layer2.0.conv2"), (4, "fc"), (1, "layer2.0.conv2")]
)
def test_the_damaged_layer_is_named(tmp_path: Path, bits: int, layer: str) -> None:
    made = net(bits)
    other: Any = copy.deepcopy(made.folded)
    with torch.no_grad():
        other.get_submodule(layer).weight.neg_()
    found = first_difference(written(tmp_path, bits, "float" if bits == 32 else "packed"), other, made.x[:8])
    # A convolution is seen at the quantizer behind it; the last layer has none.
    behind = {"conv1": "relu", "layer2.0.conv2": "layer2.0.relu2" if bits == 1 else "layer2.0.branch", "fc": "logits"}
    assert found is not None and found.layer == (layer if bits == 32 else behind[layer])
    assert 0 < found.values <= found.of and not found.on_ties
    assert str(found) == f"{found.values:,} of {found.of:,} values of {found.layer} differ"


def test_a_value_on_a_tie_is_told_from_a_fault(tmp_path: Path) -> None:
    """The reference's first sums are moved by half a step on purpose: then both codes are as near."""
    made = net(8)
    relu: Any = made.folded.get_submodule("relu")
    step = float(relu.act_quant.scale())

    class Shifted(nn.Module):
        """Puts every value just beyond the boundary below which the file has it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value = getattr(x, "value", x)
            position = value / step
            shift = position.floor() + 0.5 + 1e-4 - position
            # Only what the file rounds down, and only a few.
            few = (position > 1) & (position - position.floor() < 0.5) & (torch.arange(value.shape[-1]) == 3)
            return value + torch.where(few, shift * step, 0.0)

    other = copy.deepcopy(made.folded)
    other.bn1 = Shifted()
    found = first_difference(written(tmp_path, 8, "integer"), other, made.x[:4])
    assert found is not None and found.layer == "relu" and found.on_ties


def test_networks_of_another_depth_do_not_line_up(tmp_path: Path) -> None:
    made = net(4)
    found = first_difference(written(tmp_path, 1, "integer"), made.folded, made.x[:2])
    assert found == Difference("the file (14 layers of the network and 24 of the file do not line up)", 1, 1, False)


@pytest.mark.parametrize(("bits", "run"), [(8, "optimised"), (8, "unoptimised"), (4, "exact")])
def test_images_that_are_apart_have_a_value_on_a_tie(tmp_path: Path, bits: int, run: str) -> None:
    """What parity counts as images on rounding ties, it may: each is followed to one."""
    made, path, ways = net(bits), written(tmp_path, bits, "packed"), RUNS[run]
    with torch.no_grad():
        expected = made.folded(made.x)
    difference = (OnnxModel(path, **ways)(made.x) - expected).abs().amax(dim=1) / (expected.max() - expected.min())
    apart = (difference > APART).nonzero().flatten().tolist()
    assert len(apart) == compare(expected, OnnxModel(path, **ways)(made.x)).images_apart
    for place in apart[:10]:
        found = first_difference(path, made.folded, made.x[place : place + 1], optimise=ways["optimise"])
        assert found is not None and found.on_ties
    same = (difference <= 1e-6).nonzero().flatten().tolist()
    assert len(same) > len(made.x) / 2
    assert first_difference(path, made.folded, made.x[same[:5]], optimise=ways["optimise"]) is None
