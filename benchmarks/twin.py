"""The twin of deployed files beside onnxruntime and beside the network in PyTorch.

    python -m benchmarks.twin MODEL [MODEL ...] [--formats qonnx qcdq integer packed] [--images 300] [--rounds 7]

MODEL is a quantized model file. Each is exported without its re-check; the twin of the file is compared with the file
in onnxruntime (answers) and with the folded network (gradient of the cross-entropy, median cosine over the images), and
timed against it in turns: forward and backward pass, median over rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from robustq.cli.process import prepare

prepare()  # before torch is loaded, as in the program

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.output import head, make_parser, ratio, row  # noqa: E402
from robustq import progress  # noqa: E402
from robustq.attacks.base import Model, input_gradient  # noqa: E402
from robustq.checkpoint import load_model  # noqa: E402
from robustq.data import to_float  # noqa: E402
from robustq.models.quant.backward_rules import RULES, under_rule  # noqa: E402
from robustq.models.quant.folding import fold  # noqa: E402
from robustq.workflow.export import export_model  # noqa: E402
from robustq.workflow.open_model import frozen, open_attackable  # noqa: E402
from robustq.workflow.setup import data_for  # noqa: E402


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--formats", nargs="+", default=["qonnx", "qcdq", "integer", "packed"])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    progress.show(False)
    rules = [f"cosine, {rule}" for rule in RULES]
    head("model", "format", "same answers", *rules, "twin / network")
    for path in options.models:
        for format_name in options.formats:
            _measure(path, format_name, options)


def _measure(path: Path, format_name: str, options: argparse.Namespace) -> None:
    device = torch.device("cpu")
    network, spec, _ = load_model(path)
    folded = frozen(fold(network, spec), device)
    pixels, y = data_for(spec, None, path).test.take(options.images)
    x = to_float(pixels)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        export_model(path, format_name=format_name, images=20, recheck=False, max_drift=1.0, device="cpu", out=out)
        opened = open_attackable(next(out.glob("*.onnx")), device=device)
        same = int((opened.judge(x).argmax(1) == opened.gradient_model(x).argmax(1)).sum())
        models = opened.target().gradient_models.values()
        cosines = []
        for rule, model in zip(RULES, models, strict=True):
            mine, theirs = _gradient(model, x, y), _gradient(under_rule(folded, rule), x, y)
            cosines.append(float(functional.cosine_similarity(mine.flatten(1), theirs.flatten(1)).median()))
        seconds = _seconds([opened.gradient_model, folded], x[:128], y[:128], options.rounds)
    row(spec.label, format_name, f"{same} of {len(x)}", *(f"{one:.4f}" for one in cosines), ratio(*seconds))


def _gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return input_gradient(model, x, lambda logits: functional.cross_entropy(logits, y, reduction="none")).gradient


def _seconds(models: list[Model], x: Tensor, y: Tensor, rounds: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, kept in zip(models, found, strict=True):
            start = time.perf_counter()
            _gradient(model, x, y)
            if number:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    main()
