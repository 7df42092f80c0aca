"""A file in onnxruntime: its logits and inner values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from robustq.errors import ModelFileError


class OnnxModel:
    """Images in, logits out, by onnxruntime on the CPU.

    Args:
        path: an .onnx file with one image input (N, C, H, W), float32 or uint8, and one logits output (N, K).
        optimise: run onnxruntime's graph optimisations (as a device does) or none.
        exact: ask for exact 8-bit products on CPUs whose AVX2 path saturates (``session.x64quantprecision``).
        threads: of one operator; 0 lets onnxruntime choose.

    Raises:
        ModelFileError: onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, *, optimise: bool = True, exact: bool = False, threads: int = 0) -> None:
        options = session_options(optimise=optimise)
        options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = open_session(path, options)
        source = self._session.get_inputs()[0]
        self._input = source.name
        self.takes_uint8 = source.type == "tensor(uint8)"

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on any device -> (B, K) float32 logits on the CPU.

        A file that takes uint8 pixels is fed 255 * x, rounded.
        """
        (logits,) = self.values(x, None)
        return logits

    def values(self, x: Tensor, names: list[str] | None) -> list[Tensor]:
        """The graph outputs called ``names`` (None: all) for images ``x``, as in :meth:`__call__`."""
        images = x.detach().cpu()
        if self.takes_uint8:
            images = (images * 255).round().to(torch.uint8)
        found = self._session.run(names, {self._input: images.contiguous().numpy()})
        return [torch.from_numpy(each) for each in found]


def session_options(*, optimise: bool) -> ort.SessionOptions:
    """With all of onnxruntime's graph optimisations, or none."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors come back as exceptions
    return options


def open_session(path: Path, options: ort.SessionOptions) -> Any:
    """A session on the CPU.

    Raises:
        ModelFileError: onnxruntime cannot load the file.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types share no base below Exception
        first = str(error).strip().splitlines()[0][:160]
        raise ModelFileError(f"{path}: onnxruntime cannot load it ({first})") from error
