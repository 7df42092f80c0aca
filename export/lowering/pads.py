"""Padding of convolutions.

Convolutions say how much they pad.

Contract: ``auto_pad`` of a Conv becomes ``pads``, with the odd one of an even number behind (SAME_UPPER); VALID becomes
none. Answers stay. Why: the exporter writes ``padding="same"`` as SAME_UPPER, which onnxruntime (1.32) refuses with a
dilation ("Dilation not supported for AutoPadType"), and other runtimes altogether. PyTorch allows "same" at stride 1
only, where pads depend on no image size.

A Pad with zeros in front of convolutions becomes their own padding.

Contract: Pad(x, zeros, height and width only) - Conv becomes Conv with these pads added to its own; the Pad goes once
nobody reads it. Why: onnxruntime pads codes with the code 0, which is the value zero only where the zero point is 0, so
it leaves such a Pad, and the convolution behind it, in float.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, drop_unused_initializers


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


_OTHER_PADS = ("SAME_UPPER", "SAME_LOWER", "VALID")


def padding_in_convolutions(model: onnx.ModelProto) -> int:
    """Merge every such Pad; returns how many convolutions took one over."""
    graph = model.graph
    index = GraphIndex(graph)
    merged = 0
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        amounts = _spatial_zeros(index, pad)
        readers = index.used_by[pad.output[0]]
        if amounts is None or not readers or not all(_can_take(reader, pad.output[0]) for reader in readers):
            continue
        for conv in readers:
            own = next((one for one in conv.attribute if one.name == "pads"), None)
            before = list(own.ints) if own is not None else [0, 0, 0, 0]
            if own is not None:
                conv.attribute.remove(own)
            conv.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(before, amounts, strict=True)]))
            conv.input[0] = pad.input[0]
            merged += 1
        graph.node.remove(pad)
    drop_unused_initializers(graph)
    return merged


def _spatial_zeros(index: GraphIndex, pad: onnx.NodeProto) -> list[int] | None:
    """[top, left, bottom, right], when the Pad adds zeros to height and width and does nothing else."""
    mode = next((one.s for one in pad.attribute if one.name == "mode"), b"constant")
    amounts = index.constant(pad.input[1])
    value = index.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
    computed = len(pad.input) > 2 and pad.input[2] and value is None
    if mode != b"constant" or computed or amounts is None or amounts.size != 8 or (value is not None and value.any()):
        return None
    numbers = [int(number) for number in amounts]
    if any(numbers[place] for place in (0, 1, 4, 5)) or min(numbers) < 0:
        return None
    return [numbers[2], numbers[3], numbers[6], numbers[7]]


def _can_take(reader: onnx.NodeProto, name: str) -> bool:
    automatic = any(one.name == "auto_pad" and one.s.decode() in _OTHER_PADS for one in reader.attribute)
    return reader.op_type == "Conv" and reader.input[0] == name and name not in reader.input[1:] and not automatic
