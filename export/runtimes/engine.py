"""A file in any runtime: the interface of the runtimes, and the judge that attacks and counts ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from robustq.errors import ModelFileError, UsageError, one_line
from robustq.export.session import load_limited
from robustq.memory import names_memory

_T = TypeVar("_T")

BATCH = 32
"""Images of a call in runtimes that fix the batch when they open a file; fewer are filled up by the last one."""

LONGEST_REASON = 300
"""Characters of a runtime's own message in an error."""


@dataclass(frozen=True)
class Opening:
    """How a runtime opens a file.

    Args:
        path: the .onnx.
        threads: of one operator; 0 lets the runtime choose.
        settings: of the runtime itself, by its own names.
    """

    path: Path
    threads: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """An opened file. Its constructor takes an :class:`Opening` and raises what the runtime raises."""

    version: str

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """Images in the type and shape that the file takes, (B, ...) float32 or uint8 -> its first output, (B, ...)."""

    def close(self) -> None:
        """End what the engine started; it is not used afterwards."""


class RuntimeModel:
    """Images in, logits out, by a runtime: for other runtimes what ``OnnxModel`` is for onnxruntime.

    Args:
        name: of the runtime, for messages.
        open_engine: opens the file.
        opening: file, threads, settings.
        classes: K; None: any.
        prepare: makes the file's input of the images, in float32; None: the images, as 255 * x, rounded, for uint8.
        checked: the limits of :func:`robustq.export.session.load_limited` were checked, or others that bound the same.

    Raises:
        ModelFileError: no file that robustq may run, the runtime cannot open or run it, or it has other inputs and
            outputs.
        MemoryError: the runtime says so.
    """

    def __init__(
        self,
        name: str,
        open_engine: Callable[[Opening], Engine],
        opening: Opening,
        *,
        classes: int | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        checked: bool = False,
    ) -> None:
        self.name, self._path, self._classes, self._prepare = name, opening.path, classes, prepare
        model = onnx.load(opening.path, load_external_data=False) if checked else load_limited(opening.path)
        graph = model.graph
        constants = {one.name for one in graph.initializer}
        kinds = [one.type.tensor_type.elem_type for one in graph.input if one.name not in constants]
        if len(kinds) != 1 or kinds[0] not in (TensorProto.FLOAT, TensorProto.UINT8):
            raise ModelFileError(f"{opening.path}: does not have one input of float32 or uint8 images")
        self.takes_uint8 = kinds[0] == TensorProto.UINT8
        self._engine = self._tried(lambda: open_engine(opening), "load")
        self.version = self._engine.version

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on any device -> (B, K) float32 logits on the CPU."""
        (found,) = self.values(x, None)
        if tuple(found.shape) != (len(x), self._classes or found.shape[-1]) or found.dtype != torch.float32:
            raise ModelFileError(
                f"{self._path}: answers {len(x)} images with values of shape {tuple(found.shape)}, not with logits"
            )
        return found

    def values(self, x: Tensor, names: None) -> list[Tensor]:
        """The first output for images ``x``, as in :meth:`__call__`; ``names`` is None."""
        images = x.detach().cpu()
        if self._prepare is not None:
            images = self._prepare(images)
        elif self.takes_uint8:
            images = (images * 255).round()
        if self.takes_uint8:
            images = images.to(torch.uint8)
        rows = images.contiguous().numpy()
        return [torch.from_numpy(np.ascontiguousarray(self._tried(lambda: self._engine.run(rows), "run")))]

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """Images in the type and shape that the file takes -> its first output."""
        return self._engine.run(images)

    def close(self) -> None:
        """End what the runtime started."""
        self._engine.close()

    def _tried(self, work: Callable[[], _T], verb: str) -> _T:
        try:
            return work()
        except (UsageError, MemoryError):
            raise
        except Exception as error:  # the runtimes' own exceptions share no base below Exception
            if names_memory(str(error)):
                raise MemoryError(one_line(error, longest=LONGEST_REASON)) from error
            reason = one_line(error, longest=LONGEST_REASON)
            raise ModelFileError(f"{self._path.name}: {self.name} cannot {verb} it ({reason})") from error


def in_batches(run: Callable[[NDArray[Any]], NDArray[Any]], images: NDArray[Any]) -> NDArray[Any]:
    """Call ``run`` with single images or full batches of :data:`BATCH` alone.

    A short batch is filled up with its last image, which changes no minimum and no maximum over the batch.
    """
    if len(images) == 1:
        return run(images)
    parts = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        missing = BATCH - len(part)
        full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(run(np.ascontiguousarray(full))[: len(part)])
    return np.concatenate(parts)
