"""The search for the layer in which a file parts from its network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.export.first_difference import first_difference
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
