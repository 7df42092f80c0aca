"""The search for the layer in which a file parts from its network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.export.first_difference import Comparison, compare_layers
from tests.export.exported import net, with_ties, written


@pytest.mark.parametrize(("bits", "name"), [(32, "float"), (4, "qcdq"), (4, "packed"), (1, "qcdq"), (1, "packed")])
def test_a_faithful_file_differs_nowhere(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    assert compare_layers(written(tmp_path, bits, name), made.folded, made.x[:8]) == Comparison(None, 0)


@pytest.mark.parametrize(
    ("bits", "layer"), [(32, "layer2.0.conv2"), (4, "conv1"), (4, "layer2.0.conv2"), (4, "fc"), (1, "layer2.0.conv2")]
)
def test_the_damaged_layer_is_named(tmp_path: Path, bits: int, layer: str) -> None:
    made = net(bits)
    other: Any = copy.deepcopy(made.folded)
    with torch.no_grad():
        other.get_submodule(layer).weight.neg_()
    found = compare_layers(written(tmp_path, bits, "float" if bits == 32 else "packed"), other, made.x[:8]).fault
    # A convolution is seen at the quantizer behind it; the last layer has none.
    behind = {"conv1": "relu", "layer2.0.conv2": "layer2.0.relu2" if bits == 1 else "layer2.0.branch", "fc": "logits"}
    assert found is not None and found.layer == (layer if bits == 32 else behind[layer])
    assert 0 < found.values <= found.of
    assert str(found) == f"{found.values:,} of {found.of:,} values of {found.layer} differ"


def test_a_value_on_a_tie_is_told_from_a_fault(tmp_path: Path) -> None:
    made = net(8)
    other = with_ties(made.folded)
    assert not torch.equal(other(made.x[:4]), made.folded(made.x[:4]))  # the other codes reach the logits
    found = compare_layers(written(tmp_path, 8, "integer"), other, made.x[:4])
    assert found.fault is None and found.on_ties > 0


def test_a_tie_hides_no_fault_behind_it(tmp_path: Path) -> None:
    made = net(8)
    other: Any = with_ties(made.folded)
    with torch.no_grad():
        other.fc.bias.add_(0.01 * made.folded(made.x).std())
    found = compare_layers(written(tmp_path, 8, "integer"), other, made.x[:4])
    assert found.fault is not None and found.fault.layer == "logits" and found.on_ties > 0
