"""Each operation that cannot be quantized is refused in one line that names it, and the user's own line if known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.quantizers import Widths


class Net(nn.Module):
    """A convolution, a function of it, and a linear layer on the means."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)

    def pooled(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class TwoInputs(Net):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return self.pooled(self.conv(x) + more)


class NoLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2].contiguous()


def plain(net: Net, x: Tensor) -> Tensor:
    return net.pooled(net.conv(x))


AT_ITS_LINE: list[tuple[Callable[..., Any], dict[str, nn.Module], str]] = [
    (lambda net, x: net.pooled(net.conv(x) if x.sum() > 0 else x), {}, r"forward cannot be traced at .*control flow"),
    (lambda net, x: net.pooled(torch.fft.rfft2(net.conv(x)).abs()), {}, r"fft_rfft2\(\) .* cannot be quantized"),
    (lambda net, x: net.pooled(net.norm(net.conv(x))), {"norm": nn.LocalResponseNorm(2)}, "Local.* 'norm'.* cannot be"),
    (lambda net, x: net.pooled(net.norm(net.conv(x))), {"norm": nn.BatchNorm2d(4, track_running_stats=False)}, "Batch"),
    (
        lambda net, x: net.pooled((lambda y: torch.cummax(y, 1)[0])(net.conv(x))),
        {},
        r"cummax\(\) 'cummax'.* can",
    ),
    (lambda net, x: net.pooled(net.conv(x) - x.mean()), {}, r"mean\(\) 'mean'.* mixes the images"),
    (lambda net, x: net.pooled(net.conv(x).clamp(-1, 1)), {}, r"clamp\(\) 'clamp'.* clamps to \[-1, 1\]"),
    (
        lambda net, x: functional.softmax(net.pooled(net.conv(x)), dim=1),
        {},
        r"softmax\(\) .* \(robustq needs the logits",
    ),
    (lambda net, x: net.pooled(net.conv(x).amax((0, 2), True)), {}, r"amax\(\) 'amax'.* mixes the images"),
    (
        lambda net, x: net.pooled(net.pool(net.conv(x))[0]),
        {"pool": nn.MaxPool2d(2, return_indices=True)},
        "MaxPool2d 'pool'.* cannot be quantized",
    ),
    (lambda net, x: net.pooled(functional.dropout(net.conv(x), 0.2)), {}, r"dropout\(\) .* in eval mode too"),
    (
        lambda net, x: net.pooled(functional.avg_pool2d(net.conv(x), 2, divisor_override=3)),
        {},
        "has divisor_override=3",
    ),
    (
        lambda net, x: (lambda y: (y[:, :2].relu_(), net.pooled(y))[1])(net.conv(x)),
        {},
        r"relu_\(\) 'relu_'.* changes a part of a tensor",
    ),
]


def refusal(network: nn.Module) -> str:
    with pytest.raises(UsageError) as caught:
        quantized_graph(network, name="net", widths=Widths(4, 4), classes=2, channels=3, image_size=8)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("function", "modules", "pattern"), AT_ITS_LINE)
def test_the_message_names_the_operation_and_its_line(
    function: Callable[..., Any], modules: dict[str, nn.Module], pattern: str
) -> None:
    message = refusal(Net(function, **modules))
    assert re.search(pattern, message), message
    line = function.__code__.co_firstlineno
    assert f"{__file__}:{line}" in message


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (Net(plain, conv=weight_norm(nn.Conv2d(3, 4, 3))), "cannot be quantized"),
        (Net(lambda net, x: net.pooled(net.same(net.same(net.conv(x)))), same=nn.Conv2d(4, 4, 1)), "called 2 times"),
        (Net(lambda net, x: (net.pooled(net.conv(x)), x)), "forward returns a tuple; it must return the logits alone"),
        (TwoInputs(plain), "forward needs a second input 'more'"),
        (Net(lambda net, x: net.conv(x)), "its answer has the shape (2, 4, 6, 6) for 2 images"),
        (Net(lambda net, x: net.fc(net.conv(x).flatten(1))), "Linear 'fc'"),  # on 144 values instead of 4
        (Net(lambda net, x: net.pooled(net.conv(x) * torch.rand(1).item())), "answers twice differently"),
        (NoLayer(), "has no convolution and no linear layer"),
    ],
)
def test_networks_that_are_refused_as_a_whole(network: nn.Module, text: str) -> None:
    assert text in refusal(network)
