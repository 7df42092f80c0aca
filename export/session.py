"""A file in onnxruntime: its logits and inner values."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from robustq.errors import ModelFileError, one_line
from robustq.export.graph_limits import broken_limit
from robustq.files import open_regular
from robustq.memory import names_memory

LONGEST_RUN = 600.0
"""Seconds for one batch. onnxruntime looks at it between two layers, whose work graph_limits bounds."""


class OnnxModel:
    """Images in, logits out, by onnxruntime on the CPU.

    Args:
        path: an .onnx file with one image input (N, C, H, W), float32 or uint8, and one logits output (N, K).
        optimise: run onnxruntime's graph optimisations (as a device does) or none.
        exact: ask for exact 8-bit products on CPUs whose AVX2 path saturates (``session.x64quantprecision``).
        threads: of one operator; 0 lets onnxruntime choose.
        classes: K; None: any.
        prepare: makes the file's input of the images, in float32; None: the images, as 255 * x, rounded, for uint8.
        checked: the limits of :func:`load_limited` were checked, or others that bound the same.

    Raises:
        ModelFileError: the file does not fit (see :func:`open_session`) or has other inputs and outputs; while it is
            used: onnxruntime fails in a layer, or takes longer than :data:`LONGEST_RUN`.
        MemoryError: onnxruntime says so.
    """

    def __init__(
        self,
        path: Path,
        *,
        optimise: bool = True,
        exact: bool = False,
        threads: int = 0,
        classes: int | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        checked: bool = False,
    ) -> None:
        options = session_options(optimise=optimise)
        options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = open_session(path, options, checked=checked)
        self._path, self._classes, self._prepare = path, classes, prepare
        sources = self._session.get_inputs()
        if len(sources) != 1 or sources[0].type not in ("tensor(float)", "tensor(uint8)"):
            raise ModelFileError(f"{path}: does not have one input of float32 or uint8 images")
        self._input = sources[0].name
        self.takes_uint8 = sources[0].type == "tensor(uint8)"

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on any device -> (B, K) float32 logits on the CPU.

        A file that takes uint8 pixels is fed 255 * x, rounded.
        """
        found = self.values(x, None)
        shapes = [tuple(each.shape) for each in found]
        classes = self._classes or shapes[0][-1]
        if shapes != [(len(x), classes)] or found[0].dtype != torch.float32:
            raise ModelFileError(
                f"{self._path}: answers {len(x)} images with values of shape {shapes[0]}, not with logits"
            )
        return found[0]

    def values(self, x: Tensor, names: list[str] | None) -> list[Tensor]:
        """The graph outputs called ``names`` (None: all) for images ``x``, as in :meth:`__call__`."""
        images = x.detach().cpu()
        if self._prepare is not None:
            images = self._prepare(images)
        elif self.takes_uint8:
            images = (images * 255).round()
        if self.takes_uint8:
            images = images.to(torch.uint8)
        options = ort.RunOptions()
        timer = threading.Timer(LONGEST_RUN, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            found = self._session.run(names, {self._input: images.contiguous().numpy()}, options)
        except Exception as error:  # onnxruntime's own exception types share no base below Exception
            if names_memory(str(error)):
                raise MemoryError(one_line(error, longest=300)) from error
            reason = f"not done after {LONGEST_RUN:.0f} s" if options.terminate else one_line(error, longest=300)
            raise ModelFileError(f"{self._path.name}: onnxruntime cannot run it ({reason})") from error
        finally:
            timer.cancel()
        return [torch.from_numpy(each) for each in found]


def session_options(*, optimise: bool) -> ort.SessionOptions:
    """With all of onnxruntime's graph optimisations, or none."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors come back as exceptions
    return options


def open_session(path: Path, options: ort.SessionOptions, *, checked: bool = False) -> Any:
    """A session on the CPU; ``checked`` as for :class:`OnnxModel`.

    Raises:
        ModelFileError: as :func:`load_limited`, or onnxruntime cannot load the file.
        OSError: onnxruntime cannot write its optimised graph.
    """
    if not checked:
        load_limited(path)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types share no base below Exception
        if names_memory(str(error)):
            raise MemoryError(one_line(error, longest=300)) from error
        if "serialization failed" in str(error) and (written := options.optimized_model_filepath):
            raise OSError(errno.ENOSPC, "cannot be written", written) from error
        raise ModelFileError(f"{path}: onnxruntime cannot load it ({one_line(error, longest=300)})") from error


def load_limited(path: Path, *, side: int = 1) -> onnx.ModelProto:
    """The graph of an .onnx file that robustq may run; ``side`` of the images where its input leaves it open.

    Raises:
        ModelFileError: no regular file, no ONNX, or a limit of :func:`robustq.export.graph_limits.broken_limit`.
    """
    try:
        with open_regular(path) as file:
            model = onnx.load(file, load_external_data=False)
        refused = broken_limit(model, side=side)
    except ModelFileError:
        raise
    except Exception as error:  # protobuf, and shape inference of a broken graph
        raise ModelFileError(f"{path}: onnxruntime cannot load it ({one_line(error, longest=300)})") from error
    if refused is not None:
        raise ModelFileError(f"{path}: {refused}; robustq does not run such files")
    return model
