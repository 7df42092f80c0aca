"""The twin of .onnx files that anybody made, beside onnxruntime: values and gradients.

    python -m benchmarks.twin_real_files FILE.onnx [FILE.onnx@48x320 ...] --data cifar10.npz [--images 8] [--size 224]

Each file computes images of the data set, resized to its input, and uniform noise, both as [0, 1] and as 0 to 255, one
image at a time; @HEIGHTxWIDTH or --size is the size where the file leaves it open. onnxruntime judges; files with QONNX
operators are judged by qonnx. Of a file with an operator that the twin refuses, the part before it is compared.

Cells:

- the file's first 12 digits of SHA-256; its quantized operators, and all;
- images on which the largest entry along the output's last axis is the same, where the output has two or three axes;
- largest difference as a share of the output's range;
- images with a finite gradient other than 0, of the output's sum with random signs; of the sum of its logits, where the
  file ends in probabilities;
- slope: change of the sum of the output in the judge over a short step along the twin's gradient, divided by the change
  that the gradient predicts: median, quartiles, and number of images, those whose predicted change is above rounding.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes
from torch import Tensor
from torch.nn import functional

from benchmarks.output import head, make_parser, row
from robustq.data import load_dataset, to_float
from robustq.errors import RobustqError
from robustq.export.session import session_options
from robustq.twin.graph import Graph
from robustq.twin.network import load_twin
from robustq.twin.registry import DIALECTS, OPERATORS

STEP, QUANTIZED_STEP = 1e-4, 1e-2
"""Length of the step of the slope, as a share of the norm of the image; longer where values are rounded."""
SMALLEST = 1e-3
"""Predicted change that counts for the slope, as a share of the image's output range."""


def main() -> None:
    """Compare and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    natural = to_float(load_dataset(options.data).test.take(options.images)[0])
    head("file", "SHA-256", "operators", "input", "same largest entry", "apart", "gradients", "slope")
    for given in options.files:
        name, _, size = given.partition("@")
        height, width = map(int, size.split("x")) if size else (options.size, options.size)
        path = Path(name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        try:
            row(path.name, digest, *_compare(path, natural, height, width))
        except RobustqError as error:
            row(path.name, digest, str(error).removeprefix(f"{path}: "), *[""] * 5)
            with tempfile.TemporaryDirectory() as folder:
                part = _before_refused(path, Path(folder) / "part.onnx")
                if part is not None:
                    row(f"{path.name}, before it", digest, *_compare(part, natural, height, width))


def _before_refused(path: Path, part: Path) -> Path | None:
    """The part of a file before its first operator that the twin refuses, or None."""
    model = onnx.load(path)
    graph = model.graph
    kinds = [node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in graph.node]
    refused = [node for node, kind in zip(graph.node, kinds, strict=True) if kind not in OPERATORS]
    if not refused:
        return None
    needed, kept = {refused[0].input[0]}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(refused[0].input[0], TensorProto.FLOAT, None))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    onnx.save(model, part)
    return part


def _compare(path: Path, natural: Tensor, height: int, width: int) -> list[str]:
    twin = load_twin(path)
    graph = twin.graph
    images = _images(graph, natural, height, width)
    judge = _judge(path, graph)
    kinds = Counter(node.operator for node in graph.nodes)
    quantized = sum(count for kind, count in kinds.items() if re.search("Quant|QLinear|Integer", kind))
    same, apart, gradients, slopes = 0, 0.0, 0, []
    lowest, highest = float("inf"), -float("inf")

    def output(x: Tensor) -> Tensor:
        return twin.values(x, [graph.output])[0]

    for image in images:
        wanted, found = judge(image), output(image).detach()
        same += int((wanted.argmax(-1) == found.argmax(-1)).all())
        apart = max(apart, float((wanted - found).abs().max()))
        lowest, highest = min(lowest, float(wanted.min())), max(highest, float(wanted.max()))
        norm = float(_gradient(twin if wanted.dim() == 2 else output, image).norm())
        gradients += int(np.isfinite(norm) and norm > 0.0)
        gradient = _gradient(output, image)
        norm, step = float(gradient.norm()), (QUANTIZED_STEP if quantized else STEP) * float(image.norm())
        if 2 * step * norm > SMALLEST * float(wanted.max() - wanted.min()):
            ahead, behind = (float(_signed(judge(image + sign * step / norm * gradient))) for sign in (1, -1))
            slopes.append((ahead - behind) / (2 * step * norm))
    quartiles = np.percentile(slopes, [50, 25, 75]) if slopes else [float("nan")] * 3
    return [
        f"{quantized} of {kinds.total()}",
        " x ".join("N" if size is None else str(size) for size in graph.input_shape),
        f"{same} of {len(images)}" if wanted.dim() in (2, 3) else "",
        f"{apart / max(highest - lowest, 1e-30):.1e}",
        f"{gradients} of {len(images)}",
        f"{quartiles[0]:.2f} ({quartiles[1]:.2f} to {quartiles[2]:.2f}), {len(slopes)}",
    ]


def _images(graph: Graph, natural: Tensor, height: int, width: int) -> list[Tensor]:
    _, *shape = graph.input_shape
    last = shape[0] not in (1, 3, 4) and shape[2] in (1, 3, 4)
    channels, *sides = [shape[2], *shape[:2]] if last else shape
    size = [side or free for side, free in zip(sides, (height, width), strict=True)]
    x = functional.interpolate(natural, size=size, mode="bilinear", antialias=True)
    x = x.mean(dim=1, keepdim=True) if channels == 1 else x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, noise, 255 * x, 255 * noise])
    return list(torch.split((x.permute(0, 2, 3, 1) if last else x).contiguous(), 1))


def _judge(path: Path, graph: Graph) -> Callable[[Tensor], Tensor]:
    if any(node.operator.startswith(DIALECTS) for node in graph.nodes):
        model = ModelWrapper(str(path)).transform(InferShapes())
        return lambda x: torch.from_numpy(execute_onnx(model, {graph.input: x.numpy()})[graph.output])
    session = ort.InferenceSession(path, session_options(optimise=True), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([graph.output], {graph.input: x.numpy()})[0]).float()


def _gradient(model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    x = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_signed(model(x)), x)
    return gradient


def _signed(output: Tensor) -> Tensor:
    """The sum of an output with random signs."""
    draws = torch.rand(output.shape, generator=torch.Generator().manual_seed(0))
    return (torch.where(draws < 0.5, -1.0, 1.0) * output).sum()


if __name__ == "__main__":
    main()
