"""What cannot be quantized ends in one line that names the operation and, where it is known, the user's own line."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from robustq.errors import UsageError
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.quantizers import Widths


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def pooled(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:  # here
            x = x * 2
        return self.pooled(x)


class Function(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.conv(x))  # here
        return self.pooled(x.abs())


class Module(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.conv(x)))  # here


class Matrix(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        x = torch.matmul(x, x.transpose(1, 2))  # here
        return self.pooled(x.unsqueeze(3))


class Mean(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.mean(3).mean(2))  # type: ignore[no-any-return]  # here


class Clamp(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.conv(x).clamp(-1, 1))  # here


class Softmax(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional.softmax(self.pooled(self.conv(x)), dim=1)  # here


class Pad(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.conv(functional.pad(x, (1, 1), value=0.5)))  # here


class Reflect(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.conv(x))  # here


class Normed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.conv(x))


class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.same(self.same(self.conv(x)).relu()))


class Pair(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.pooled(x), x


class Two(Base):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.pooled(self.conv(x) + more)


class BatchDependent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.conv(x)))  # here


class Uneven(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.conv(x)).flatten(1))  # here
        return logits


class Divisor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(functional.avg_pool2d(self.conv(x), 2, divisor_override=3))  # here


class Part(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x[:, :2].relu_()  # here
        return self.pooled(x)


class Map(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2].contiguous()


REFUSED: dict[type[nn.Module], str] = {
    Branch: r"forward cannot be traced at .*: symbolically traced variables cannot be used as inputs to control flow",
    Function: r"fft_rfft2\(\) 'fft_rfft2'.* cannot be quantized",
    Module: r"GroupNorm 'norm'.* cannot be quantized",
    Matrix: r"matmul\(\) 'matmul'.* cannot be quantized",
    Mean: r"mean\(\) 'mean'.* is a mean over dim=None|mean over dim=3",
    Clamp: r"clamp\(\) 'clamp'.* clamps to \[-1, 1\]",
    Softmax: r"softmax\(\) 'softmax'.* \(robustq needs the logits",
    Pad: r"pad\(\) 'pad'.* cannot be quantized",
    Reflect: r"Conv2d 'conv'.* pads with 'reflect'",
    Normed: r"conv.*(computes its weight|cannot be quantized)",
    Shared: r"Conv2d 'same' is called 2 times",
    Pair: r"forward returns a tuple; it must return the logits alone",
    Two: r"forward needs a second input 'more'",
    BatchDependent: r"BatchNorm2d 'norm'.* cannot be quantized",
    Uneven: r"AdaptiveAvgPool2d 'pool'.* pools 6x6 to 4x4 in unequal windows",
    Divisor: r"AvgPool2d 'avg_pool2d'.* has divisor_override=3, which ONNX does not have",
    Part: r"relu_\(\) 'relu_'.* changes a part of a tensor in place",
    Map: r"its answer has the shape \(2, 4, 6, 6\) for 2 images",
    Empty: r"has no convolution and no linear layer",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_one_line_names_it(kind: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match=REFUSED[kind]) as caught:
        quantized_graph(kind(), name="net", widths=Widths(4, 4), classes=2, channels=3, image_size=8)
    assert "\n" not in str(caught.value)
    lines, start = inspect.getsourcelines(kind)
    marked = [start + offset for offset, line in enumerate(lines) if line.rstrip().endswith("# here")]
    if marked:
        assert f"{Path(__file__)}:{marked[0]}" in str(caught.value)
