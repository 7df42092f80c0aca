"""Effect of rounding biases: to a part of the accumulator's step, to the step itself, or floats in the runtime.

    python -m benchmarks.bias_steps [--bits 8 4 3 2 1] [--epochs 10] [--seeds 0 1 2]
    python -m benchmarks.bias_steps --data cifar10 --architecture resnet20 --images 10000 --seeds 0

A network is trained naturally from scratch at each width and folded. Columns compare the test images with the unfolded
network: number of other predictions, and mean logit difference as a share of the logit range. `finer`: as in exported
files. `accumulator`: Brevitas' Int32Bias. `float`: a qcdq file with float32 biases under the installed onnxruntime,
whose optimisations round them to the accumulator's step (with multiplied weight codes).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from benchmarks.output import head, make_parser, row
from robustq.data import load_dataset, to_float
from robustq.export.formats import build
from robustq.export.lowering.graph import GraphIndex
from robustq.export.parity import RUNS, compare, logits_of
from robustq.export.session import OnnxModel
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import load_recipe
from robustq.workflow.job import Job
from robustq.workflow.training_run import run_recipe

COLUMNS = ("finer", "accumulator", "float, unoptimised", "float, optimised")


def main() -> None:
    """Train, fold, print a row for each network."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--architecture", default="resnet8")
    parser.add_argument("--images", type=int, default=0, help="training images (0: all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2, 1])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    head("bits", "seed", "clean", *COLUMNS)
    for bits in options.bits:
        for seed in options.seeds:
            row(bits, seed, *_cells(options, bits, seed))


def _cells(options: argparse.Namespace, bits: int, seed: int) -> list[str]:
    data = load_dataset(options.data, train_images=options.images)
    shape = (data.classes, data.channels, data.image_size)
    spec = ModelSpec(options.architecture, bits, bits, *shape, options.data, None, ())
    torch.manual_seed(seed)
    model = build_model(spec)
    recipe = load_recipe("natural", (f"epochs={options.epochs}",))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        device = torch.device("cpu")
        run_recipe(model, Job(spec=spec, data=data, recipe=recipe, seed=seed, device=device, out=out, source=None))
    images, labels = data.test.take(0)
    x = to_float(images)
    expected = logits_of(model, x, label="unfolded")
    clean = (expected.argmax(1) == labels).float().mean().item()
    with mock.patch("robustq.models.quant.folded_layers.bias_steps", return_value=1):
        coarse = fold(model, spec)
    logits = [logits_of(folded, x, label="folded") for folded in (fold(model, spec), coarse)]
    found = [compare(expected, one) for one in [*logits, *_float_bias_logits(model, spec, x)]]
    shown = [f"{one.different_top1} of {one.images}, {one.mean_difference:.1e}" for one in found]
    return [f"{clean:.1%}", *shown]


def _float_bias_logits(model: torch.nn.Module, spec: ModelSpec, x: Tensor) -> list[Tensor]:
    """Logits of a qcdq file whose biases are float32 initializers, unoptimised and optimised."""
    written = build("qcdq", fold(model, spec), spec)
    index = GraphIndex(written.graph)
    for node in written.graph.node:
        bias = index.made_by.get(node.input[2]) if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else None
        if bias is None or bias.op_type != "DequantizeLinear":
            continue
        codes, scale = (np.asarray(index.constant(name), dtype=np.float64) for name in bias.input[:2])
        name = f"{node.name}_float_bias"
        written.graph.initializer.append(numpy_helper.from_array((codes * scale).astype(np.float32), name))
        node.input[2] = name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float-biases.onnx"
        onnx.save(written, path)
        runs = [OnnxModel(path, **RUNS[run]) for run in ("unoptimised", "optimised")]
        return [logits_of(run, x, label="float biases") for run in runs]


if __name__ == "__main__":
    main()
