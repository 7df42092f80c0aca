"""Which layer the features enter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.quantizers import Widths
from robustq.models.spec import build_model
from robustq.models.state_dict import feature_layer_of
from tests.models.own.own_nets import CLASSES, SIDE, float_net, graph_of
from tests.models.small_nets import small_spec

FOUND = {
    "tutorial": "max_pool2d_1",  # no global pooling: the last pooling of all
    "normalising": "pool",
    "inverted": "mean",
    "branching": "pool",  # windows of two, but the last one
    "gated": "adaptive_avg_pool2d",  # not the squeezing one, which comes first
    "splitting": "max_pool2d",
}


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", sorted(FOUND))
def test_found_on_the_graph(name: str, bits: int) -> None:
    graph = graph_of(name, bits)
    assert feature_layer_of(graph) == FOUND[name]
    caught: list[Tensor] = []
    graph.get_submodule(FOUND[name]).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        graph(torch.rand(2, 3, SIDE, SIDE))
    assert len(caught) == 1 and caught[0].dim() == 4


def test_ours() -> None:
    assert feature_layer_of(build_model(small_spec(4))) == "avgpool"
    assert feature_layer_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("wanted", "found"), [("head", "head"), ("block", "block.0"), ("block.3", "block.3"), ("stem.2", "stem.2")]
)
def test_named(wanted: str, found: str) -> None:
    graph = quantized_graph(
        float_net("inverted"),
        name="net",
        widths=Widths(4, 4),
        classes=CLASSES,
        channels=3,
        image_size=SIDE,
        feature_layer=wanted,
    )
    assert feature_layer_of(graph) == found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("heads", "--feature-layer heads: net has no such layer; nearest: head"),
        ("classifier", r"a tensor of shape \(2, 16\) enters it"),
    ],
)
def test_names_that_do_not_do(wanted: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantized_graph(
            float_net("inverted"),
            name="net",
            widths=Widths(4, 4),
            classes=CLASSES,
            channels=3,
            image_size=SIDE,
            feature_layer=wanted,
        )
