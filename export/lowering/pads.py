"""Passes on the padding of convolutions."""

from __future__ import annotations

import onnx
from onnx import helper

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, attributes, drop_unused_initializers


def explicit_pads(model: onnx.ModelProto) -> int:
    """Replace ``auto_pad`` by ``pads``; returns how many Conv changed.

    SAME_UPPER puts the odd one of an even kernel behind. The exporter writes ``padding="same"`` so, which onnxruntime
    (1.32) refuses with a dilation ("Dilation not supported for AutoPadType"), and other runtimes altogether. PyTorch
    allows "same" at stride 1 only, where pads do not depend on the image size.

    Raises:
        ExportError: another ``auto_pad``.
    """
    changed = 0
    for node in model.graph.node:
        given = attributes(node)
        automatic = given.pop("auto_pad", b"NOTSET")
        if node.op_type != "Conv" or automatic == b"NOTSET":
            continue
        kernel = given["kernel_shape"]
        same = automatic == b"SAME_UPPER" and set(given.get("strides", [1])) == {1}
        if not same and automatic != b"VALID":
            raise ExportError(f"{node.name}: pads by {automatic.decode()}; write its padding as numbers")
        dilations = given.get("dilations", [1] * len(kernel))
        total = [d * (k - 1) if same else 0 for k, d in zip(kernel, dilations, strict=True)]
        given["pads"] = [size // 2 for size in total] + [size - size // 2 for size in total]
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in given.items())
        changed += 1
    return changed


def padding_in_convolutions(model: onnx.ModelProto) -> int:
    """Merge each Pad of height and width with zeros into the convolutions that read it; returns how many of them.

    onnxruntime pads codes with the code 0, which is the value 0 only where the zero point is 0, so it would leave the
    Pad and the convolution in float.
    """
    graph = model.graph
    index = GraphIndex(graph)
    merged = 0
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        amounts = _spatial_zeros(index, pad)
        readers, padded = index.used_by[pad.output[0]], pad.output[0]
        can_take = [
            reader.op_type == "Conv"
            and [place for place, name in enumerate(reader.input) if name == padded] == [0]
            and attributes(reader).get("auto_pad", b"NOTSET") == b"NOTSET"
            for reader in readers
        ]
        if amounts is None or not readers or not all(can_take):
            continue
        for conv in readers:
            before = attributes(conv).get("pads", [0, 0, 0, 0])
            for own in [one for one in conv.attribute if one.name == "pads"]:
                conv.attribute.remove(own)
            conv.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(before, amounts, strict=True)]))
            conv.input[0] = pad.input[0]
            merged += 1
        graph.node.remove(pad)
    drop_unused_initializers(graph)
    return merged


def _spatial_zeros(index: GraphIndex, pad: onnx.NodeProto) -> list[int] | None:
    """[top, left, bottom, right], when the Pad adds zeros to height and width and does nothing else."""
    mode = attributes(pad).get("mode", b"constant")
    amounts, value = index.input(pad, 1), index.input(pad, 2)
    computed = len(pad.input) > 2 and pad.input[2] and value is None
    if mode != b"constant" or computed or amounts is None or amounts.size != 8 or (value is not None and value.any()):
        return None
    numbers = [int(number) for number in amounts]
    if any(numbers[place] for place in (0, 1, 4, 5)) or min(numbers) < 0:
        return None
    return [numbers[2], numbers[3], numbers[6], numbers[7]]
