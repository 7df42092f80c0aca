"""Each graph pass by itself: what it rewrites, and that no answer changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.fx.adaptive_pooling import fix_adaptive_pooling
from robustq.models.fx.passes import (
    clamp_to_relu,
    functions_to_modules,
    relu_first,
    remove_inplace,
)
from robustq.models.fx.shapes import fix_reshapes, mean_to_pooling
from robustq.models.fx.trace import shape_prop, trace
from robustq.models.fx.windows import fix_pooling_windows

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A network that is one function of its input and of a few modules."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def traced(function: Callable[..., Tensor], **modules: nn.Module) -> GraphModule:
    return trace(Calls(function, **modules), name="net")


def probed(function: Callable[..., Tensor], **modules: nn.Module) -> GraphModule:
    graph = traced(function, **modules)
    functions_to_modules(graph)
    shape_prop(graph, channels=4, image_size=6, name="net")
    return graph


def steps(graph: GraphModule) -> list[str]:
    """What the graph calls, in order: types of modules, names of functions and methods."""
    return [
        type(graph.get_submodule(node.target)).__name__
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
        for node in graph.graph.nodes
        if node.op.startswith("call")
    ]


def same(graph: GraphModule, function: Callable[..., Tensor], **modules: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(graph(X.clone()), Calls(function, **modules).eval()(X.clone()))


def add_to_itself(_: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y += x
    functional.relu_(y)
    y.mul_(3)
    return y + functional.leaky_relu(y - 5, inplace=True)


def test_in_place_operations_give_what_later_readers_saw() -> None:
    graph = traced(add_to_itself)
    remove_inplace(graph)
    assert steps(graph) == ["mul", "add", "relu", "mul", "sub", "leaky_relu", "add"]
    assert same(graph, add_to_itself)
    x = X.clone()
    graph(x)
    assert torch.equal(x, X)


def modules_in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    net.act(y)  # type: ignore[operator]
    return y


def test_a_module_in_place_whose_result_is_dropped() -> None:
    act = nn.ReLU(inplace=True)
    graph = traced(modules_in_place, act=act)
    remove_inplace(graph)
    assert same(graph, modules_in_place, act=act)
    assert act.inplace and not graph.get_submodule("act").inplace


def functions(net: nn.Module, x: Tensor) -> Tensor:
    x = functional.relu(x)
    x = net.relu(x - 1)  # type: ignore[operator]
    x = functional.dropout(x.relu(), 0.5, net.training)
    return functional.max_pool2d(functional.hardtanh(x, 0.0, 0.7), 2, stride=1)


def test_functions_become_modules_beside_names_in_use() -> None:
    relu = nn.ReLU()
    graph = traced(functions, relu=relu)
    functions_to_modules(graph)
    assert steps(graph) == ["ReLU", "sub", "ReLU", "ReLU", "Dropout", "Hardtanh", "MaxPool2d"]
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(set(targets)) == len(targets) and targets[1] == "relu"
    assert same(graph.eval(), functions, relu=relu)
    graph.train()
    assert not torch.equal(graph(X), graph(X)), "dropout follows the mode"


@pytest.mark.parametrize(
    ("rewrite", "function", "expected"),
    [
        (clamp_to_relu, lambda _, x: torch.clamp(x, 0), ["relu"]),
        (clamp_to_relu, lambda _, x: x.clip(0, 1.5), ["hardtanh"]),
        (mean_to_pooling, lambda _, x: torch.mean(x, dim=(3, 2)), ["AdaptiveAvgPool2d", "flatten"]),
        (mean_to_pooling, lambda _, x: torch.mean(x, [2, 3], True), ["AdaptiveAvgPool2d"]),
        (fix_reshapes, lambda _, x: torch.reshape(x, (x.shape[0], x.shape[1] * 36)), ["flatten"]),
        (fix_reshapes, lambda _, x: x.view(x.size(0), 2, 2, x.size(2), x.size(3)), ["reshape"]),
        (fix_reshapes, lambda _, x: x.flatten(2), ["reshape"]),
        (fix_reshapes, lambda _, x: x.chunk(3, dim=1)[1], ["split", "getitem"]),
        (fix_reshapes, lambda _, x: x.permute(1, 0, 2, 3).reshape(4, -1), ["permute", "reshape"]),
    ],
)
def test_calls_are_replaced(
    rewrite: Callable[[GraphModule], None], function: Callable[..., Tensor], expected: list[str]
) -> None:
    graph = probed(function)
    rewrite(graph)
    assert steps(graph) == expected
    assert same(graph, function)


def pooled_then_relu(net: nn.Module, x: Tensor) -> Tensor:
    return functional.relu(torch.flatten(net.drop(functional.max_pool2d(x, 3, padding=1)), 1))  # type: ignore[operator]


def test_a_relu_moves_to_the_front_of_all_that_commutes() -> None:
    graph = probed(pooled_then_relu, drop=nn.Dropout(0.5))
    relu_first(graph)
    assert steps(graph) == ["ReLU", "MaxPool2d", "Dropout", "flatten"]
    assert same(graph, pooled_then_relu, drop=nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("stays", "behind"),
    [
        # While training, dropout would lift values over the bound.
        (lambda net, x: functional.relu6(net.drop(x)), "drop"),
        (lambda net, x: (lambda y: functional.relu(y) + y)(functional.max_pool2d(x, 2)), "max_pool2d"),
    ],
)
def test_other_relus_stay(stays: Callable[..., Tensor], behind: str) -> None:
    graph = probed(stays, drop=nn.Dropout(0.5))
    relu_first(graph)
    (relu,) = [node for node in graph.graph.nodes if "relu" in node.name]
    assert relu.all_input_nodes[0].name == behind
    assert same(graph, stays, drop=nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (6, nn.Identity),
        ((3, 2), nn.AvgPool2d),
        ((12, 18), nn.UpsamplingNearest2d),
        (1, nn.AdaptiveAvgPool2d),
        ((4, 7), nn.AvgPool2d),  # windows of two; of one and two pixels
    ],
)
def test_adaptive_pooling(size: int | tuple[int, int], kind: type[nn.Module]) -> None:
    graph = probed(lambda net, x: net.pool(x), pool=nn.AdaptiveAvgPool2d(size))
    fix_adaptive_pooling(graph, averages=True)
    assert type(graph.get_submodule("pool")) is kind
    with torch.no_grad():
        # Windows of equal size: the same sums, perhaps in another order.
        torch.testing.assert_close(graph(X), nn.AdaptiveAvgPool2d(size)(X), atol=1e-6, rtol=0)


def test_adaptive_maxima_in_windows_of_unequal_size() -> None:
    graph = probed(lambda net, x: net.pool(x), pool=nn.AdaptiveMaxPool2d((4, 7)))
    fix_adaptive_pooling(graph, averages=True)
    assert steps(graph) == ["PickedPixels", "MaxPool2d"]
    assert same(graph, lambda net, x: net.pool(x), pool=nn.AdaptiveMaxPool2d((4, 7)))


@pytest.mark.parametrize(
    ("pool", "expected", "ceil_mode", "counts"),
    [
        (nn.AvgPool2d(2), ["AvgPool2d"], False, False),
        (nn.AvgPool2d(3, 2, ceil_mode=True), ["AvgPool2d"], True, False),  # 6 -> 3, not 2
        (nn.AvgPool2d(2, 2, ceil_mode=True), ["AvgPool2d"], False, False),
        (nn.AvgPool2d(2, 3, 1, ceil_mode=True), ["AvgPool2d"], False, True),  # the added window lies in the padding
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), ["pad", "AvgPool2d"], True, False),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), ["AvgPool2d"], True, False),
        (nn.AvgPool2d(3, 2, (1, 0), ceil_mode=True), ["pad", "AvgPool2d"], True, False),
        (nn.MaxPool2d(2, 3, ceil_mode=True), ["MaxPool2d"], False, None),
        (nn.MaxPool2d(2, 3, 1, 2, ceil_mode=True), ["MaxPool2d"], True, None),
    ],
    ids=str,
)
def test_pooling_windows(pool: nn.Module, expected: list[str], ceil_mode: bool, counts: bool | None) -> None:
    graph = probed(lambda net, x: net.pool(x), pool=pool)
    fix_pooling_windows(graph)
    assert steps(graph) == expected
    made = graph.get_submodule("pool")
    assert (made.ceil_mode, getattr(made, "count_include_pad", None)) == (ceil_mode, counts)
    assert same(graph, lambda net, x: net.pool(x), pool=pool)
