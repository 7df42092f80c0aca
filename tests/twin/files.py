"""Small .onnx classifiers that robustq did not write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn


class Net(nn.Module):
    """A residual block between two convolutions, for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.inner(x))
        logits: Tensor = self.last(x.mean(dim=(2, 3)))
        return logits


def trained(x: Tensor, y: Tensor, *, steps: int = 300) -> Net:
    """The network after some steps of Adam on all images."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.eval()


def write(net: nn.Module, path: Path, *, size: int = 8, batch: int | None = None) -> Path:
    """The float file, with any number of images or one."""
    axes = None if batch else {"images": {0: "N"}, "logits": {0: "N"}}
    torch.onnx.export(
        net,
        (torch.rand(batch or 2, 1, size, size),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    return path


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of 16 images."""

    def __init__(self, x: Tensor) -> None:
        self._rest: Iterator[Tensor] = iter([x[start : start + 16] for start in range(0, len(x), 16)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        batch = next(self._rest, None)
        return None if batch is None else {"images": batch.numpy()}


KINDS = [
    (layout, per_channel, activations, weights)
    for layout in ("QDQ", "QOperator")
    for per_channel, activations, weights in (
        (False, "QUInt8", "QInt8"),
        (True, "QUInt8", "QInt8"),
        (False, "QUInt8", "QUInt8"),
        (True, "QInt8", "QInt8"),
    )
]


def quantized(source: Path, path: Path, x: Tensor, kind: tuple[str, bool, str, str] | None, **options: Any) -> Path:
    """The file quantized by onnxruntime with calibration on x; dynamically for ``kind`` None."""
    if kind is None:
        quantize_dynamic(source, path)
    else:
        layout, per_channel, activations, weights = kind
        quantize_static(
            source,
            path,
            Reader(x),
            quant_format=QuantFormat[layout],
            per_channel=per_channel,
            activation_type=QuantType[activations],
            weight_type=QuantType[weights],
            **options,
        )
    return path


def changed(source: Path, path: Path, change: Any) -> Path:
    """The file with its model changed by a function."""
    model = onnx.load(source)
    change(model)
    onnx.save(model, path)
    return path
