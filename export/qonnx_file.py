"""QONNX as the qonnx package and FINN expect it: cleaned up, and run by qonnx's own executor."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from torch import Tensor


def clean_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants folded, nodes and tensors named, shapes inferred: what every QONNX consumer starts with.

    The batch axis stays symbolic.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    cleaned: onnx.ModelProto = cleanup_model(ModelWrapper(model)).model
    return cleaned


def execute(model: onnx.ModelProto, images: Tensor) -> Tensor:
    """Logits (N, K) of ``images`` (N, C, H, W) float32 by qonnx's executor; seconds per image, so for tens of images.

    The executor needs a concrete batch size: with a symbolic one it reports a shape mismatch with 0.
    """
    import qonnx.core.onnx_exec
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    concrete = cleanup_model(ModelWrapper(model, make_deepcopy=True), override_inpsize=len(images))
    feed = {concrete.graph.input[0].name: images.detach().cpu().numpy().astype(np.float32)}
    outputs = qonnx.core.onnx_exec.execute_onnx(concrete, feed)
    return torch.from_numpy(np.asarray(outputs[concrete.graph.output[0].name]))
