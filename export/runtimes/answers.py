"""What a runtime answers, beside onnxruntime and beside the network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.evaluation.accuracy import predict
from robustq.export.runtimes.registry import check_installed

BATCH = 100


@dataclass(frozen=True)
class RuntimeAnswers:
    """Another runtime than onnxruntime as the judge, and its answers to the clean images.

    Args:
        name, version: of the runtime.
        images, different: clean images, and those that onnxruntime puts into another class.
    """

    name: str
    version: str
    images: int
    different: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The difference, with its count."""
        return (
            f"{self.name} {self.version} is the judge; it answers {self.different} of {self.images} clean images "
            "otherwise than onnxruntime"
        )


def compare_with_onnxruntime(name: str, judge: Model, onnxruntime: Model, images: Tensor) -> RuntimeAnswers:
    """The classes of two judges for images, uint8 (N, C, H, W); ``name``: the runtime of the first."""
    x = to_float(images)
    first, second = (predict(one, x, batch_size=BATCH) for one in (judge, onnxruntime))
    return RuntimeAnswers(name, check_installed(name), len(x), int((first != second).sum()))
