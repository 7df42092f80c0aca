"""QONNX files: cleaned up for FINN and hls4ml, and run by qonnx's own executor."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from robustq.errors import ExportError, one_line
from robustq.export.lowering.fixed_point_multipliers import CHANNELS_LAST
from robustq.progress import bar

EXECUTOR_BATCH = 20


def clean_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, name nodes and tensors, infer shapes, annotate datatypes; the batch axis stays symbolic."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

    cleaned: onnx.ModelProto = cleanup_model(ModelWrapper(model)).transform(InferDataTypes()).model
    return cleaned


def execute(model: onnx.ModelProto, images: Tensor) -> Tensor:
    """Logits (N, K) of ``images`` (N, C, H, W) float32 by qonnx's executor, slow: seconds for a hundred images.

    Raises:
        ExportError: the executor fails.
    """
    import onnxruntime as ort
    import qonnx.core.onnx_exec

    size = min(EXECUTOR_BATCH, len(images))
    concrete = _with_batch(model, size)
    source, sink = concrete.graph.input[0].name, concrete.graph.output[0].name
    logits = []
    with bar("qonnx executor", len(images)) as progress, ExitStack() as afterwards:
        # onnxruntime warns of channels-last layers, which qonnx declares as opset 1; the default severity is 2.
        ort.set_default_logger_severity(3)
        afterwards.callback(ort.set_default_logger_severity, 2)
        for part in torch.split(images.detach().cpu().float(), size):
            # The executor needs a fixed batch size: a short last batch is filled up with black images.
            full = np.zeros((size, *part.shape[1:]), np.float32)
            full[: len(part)] = part.numpy()
            try:
                outputs = qonnx.core.onnx_exec.execute_onnx(concrete, {source: full})
            except Exception as error:  # of qonnx' own, of onnxruntime, and of numpy
                raise ExportError(f"qonnx cannot run it as QONNX ({one_line(error, longest=120)})") from error
            logits.append(torch.from_numpy(np.asarray(outputs[sink]))[: len(part)])
            progress.advance(len(part))
    return torch.cat(logits)


def _with_batch(model: onnx.ModelProto, size: int) -> Any:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    wrapped = ModelWrapper(model, make_deepcopy=True)
    graph = wrapped.graph
    if all(node.domain != CHANNELS_LAST for node in model.graph.node):
        # Not cleanup_model's override_inpsize, which takes the first number of every Reshape for the batch size.
        del graph.value_info[:]
        for value in (graph.input[0], graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = size
        return cleanup_model(wrapped)
    # qonnx (1.0.0) cannot infer the shapes of channels-last layers; all are annotated, for a batch of one.
    computed = {graph.input[0].name}
    for node in graph.node:
        if computed.intersection(node.input):
            computed.update(node.output)
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.name in computed:
            value.type.tensor_type.shape.dim[0].dim_value = size
    return wrapped
