"""A QONNX graph in the layout that hls4ml reads: channels last, one image at a time.

Contract: convolutions and pooling take (1, H, W, C) in qonnx' channels-last domain; the input stays (1, C, H, W), with a
Transpose behind it. What the last Flatten takes is one pixel, so that no Transpose stands in front of it. Multipliers
of one value per channel have shape (C,), since hls4ml (1.3.0) takes a leading axis of a constant for pixels. Values are
unchanged.
"""

from __future__ import annotations

import warnings
from typing import Any

import onnx

CHANNELS_LAST = "qonnx.custom_op.channels_last"
"""Domain of the layers in that layout."""


def channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in that layout; shapes are annotated."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.general import RemoveUnusedTensors
    from qonnx.util.cleanup import cleanup_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not absorb transpose")
        wrapped = cleanup_model(ModelWrapper(model), override_inpsize=1).transform(ConvertToChannelsLastAndClean())
    wrapped = cleanup_model(wrapped)
    for node in list(wrapped.graph.node):
        if node.op_type == "Mul":
            _drop_leading_axes(wrapped, wrapped.find_producer(node.input[1]))
        elif node.op_type == "Flatten":
            transpose = wrapped.find_producer(node.input[0])
            node.input[0] = transpose.input[0]
            wrapped.graph.node.remove(transpose)
    # A new wrapper writes down the shapes of constants, too, which hls4ml asks for.
    converted: onnx.ModelProto = ModelWrapper(wrapped.transform(RemoveUnusedTensors()).model).model
    return converted


def _drop_leading_axes(wrapped: Any, quantizer: onnx.NodeProto) -> None:
    values = wrapped.get_initializer(quantizer.input[0])
    if values.ndim > 1:
        wrapped.set_initializer(quantizer.input[0], values.reshape(-1))
        wrapped.set_tensor_shape(quantizer.output[0], [values.size])
