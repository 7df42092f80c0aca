"""Convolutions say how much they pad.

Contract: ``auto_pad`` of a Conv becomes ``pads``, with the odd one of an even number behind (SAME_UPPER); VALID becomes
none. Answers stay. Why: the exporter writes ``padding="same"`` as SAME_UPPER, which onnxruntime (1.32) refuses with a
dilation ("Dilation not supported for AutoPadType"), and other runtimes altogether. PyTorch allows "same" at stride 1
only, where pads depend on no image size.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from robustq.errors import ExportError


def explicit_pads(model: onnx.ModelProto) -> int:
    """Rewrite every such Conv; returns how many."""
    changed = 0
    for node in model.graph.node:
        attributes: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        automatic = attributes.pop("auto_pad", b"NOTSET")
        if node.op_type != "Conv" or automatic == b"NOTSET":
            continue
        kernel = attributes["kernel_shape"]
        same = automatic == b"SAME_UPPER" and set(attributes.get("strides", [1])) == {1}
        if not same and automatic != b"VALID":
            raise ExportError(f"{node.name}: pads by {automatic.decode()}; write its padding as numbers")
        dilations = attributes.get("dilations", [1] * len(kernel))
        total = [d * (k - 1) if same else 0 for k, d in zip(kernel, dilations, strict=True)]
        attributes["pads"] = [size // 2 for size in total] + [size - size // 2 for size in total]
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        changed += 1
    return changed
