"""QONNX as the qonnx package and FINN expect it: cleaned up, and run by qonnx's own executor."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from torch import Tensor

from robustq.progress import bar

EXECUTOR_BATCH = 20


def clean_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants folded, nodes and tensors named, shapes inferred, every tensor's datatype annotated: what every QONNX
    consumer starts with.

    The batch axis stays symbolic.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

    cleaned: onnx.ModelProto = cleanup_model(ModelWrapper(model)).transform(InferDataTypes()).model
    return cleaned


def execute(model: onnx.ModelProto, images: Tensor) -> Tensor:
    """Logits (N, K) of ``images`` (N, C, H, W) float32 by qonnx's executor; slow, so for a hundred images or so.

    The executor needs a concrete batch size: with a symbolic one it reports a shape mismatch with 0.
    """
    import qonnx.core.onnx_exec
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    size = min(EXECUTOR_BATCH, len(images))
    concrete = cleanup_model(ModelWrapper(model, make_deepcopy=True), override_inpsize=size)
    source, sink = concrete.graph.input[0].name, concrete.graph.output[0].name
    logits = []
    with bar("qonnx executor", len(images)) as progress:
        for part in torch.split(images.detach().cpu().float(), size):
            # A short last batch is filled up with black images, whose logits are dropped.
            full = np.zeros((size, *part.shape[1:]), np.float32)
            full[: len(part)] = part.numpy()
            outputs = qonnx.core.onnx_exec.execute_onnx(concrete, {source: full})
            logits.append(torch.from_numpy(np.asarray(outputs[sink]))[: len(part)])
            progress.advance(len(part))
    return torch.cat(logits)
