"""Attacks on deployed files through their twins, beside attacks with the gradients of the network in PyTorch.

    python -m benchmarks.twin_attacks MODEL [MODEL ...] --out FOLDER [--images 500] [--answers 2000] [--epsilon 8/255]
                                      [--formats integer packed] [--nncf PYTHON]

MODEL is a model file of robustq. A float one is exported plainly by torch.onnx and quantized by onnxruntime (static:
QDQ and QOperator, per tensor and per channel, u8s8, u8u8, s8s8; dynamic), in part with a Softmax at its end too, and
with --nncf by NNCF, where PYTHON is the interpreter of an environment that has it. A quantized MODEL is exported by
robustq in --formats.

Both attacks run the suite `recheck` (FGSM, PGD-20, margin-PGD-40, gradients of the straight-through rule) on the same
images with the same seed, and onnxruntime judges both. FOLDER keeps files and rows; a second call goes on where the
first one stopped.

Cells: of --answers clean images, those on which twin and onnxruntime give the same class, and the largest logit
difference as a share of the logit range; of --images, accuracy without attack, and robust accuracy found through the
file alone and through the network in PyTorch, with 95% intervals; their difference in points; images broken through the
file alone but not through the network, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn

from benchmarks.output import head, make_parser, percent, row
from robustq import progress
from robustq.checkpoint import load_model
from robustq.data import to_float
from robustq.evaluation.accuracy import all_logits, wilson_interval
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import find_suite, run_suite
from robustq.evaluation.target import AS_TRAINED, Target, one_by_one
from robustq.models.spec import ModelSpec
from robustq.recipe import parse_epsilon
from robustq.twin.deployed import TwinOnImages
from robustq.workflow.export import export_model
from robustq.workflow.open_model import OpenedModel, frozen, open_attackable
from robustq.workflow.setup import data_for

CPU = torch.device("cpu")
CALIBRATION = 256
NNCF = Path(__file__).parent / "runners" / "quantize_nncf.py"
KINDS = ("u8s8", "u8u8", "s8s8")
"""Activations and weights of onnxruntime's static quantizer."""


def main() -> None:
    """Attack and print."""
    parser = make_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--epsilon", type=parse_epsilon, default=8 / 255)
    parser.add_argument("--formats", nargs="+", default=["integer", "packed"])
    parser.add_argument("--nncf", metavar="PYTHON")
    options = parser.parse_args()
    progress.show(False)
    logging.getLogger().setLevel(logging.ERROR)  # hints of onnxruntime's quantizer
    robust = ("robust, file alone", "robust, PyTorch", "difference", "by one alone")
    head("model", "file", "same answers", "logits apart", "clean", *robust)
    for path in options.models:
        for name, found in _rows(path, options):
            row(path.parent.name, name, *found.values())


@dataclass(frozen=True)
class File:
    """A file under attack, and the export folder that it lies in if robustq wrote it."""

    name: str
    path: Path
    folder: Path | None = None


def _rows(path: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    network, spec, _ = load_model(path)
    data = data_for(spec, None, path)
    x, y = data.test.take(options.images)
    clean = to_float(data.test.take(options.answers)[0])
    folder = options.out / path.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    if spec.widths.is_float:
        files = _foreign(network, to_float(data.train.take(CALIBRATION)[0]), folder, options.nncf)
    else:
        files = _own(path, folder, options.formats)
    for file in files:
        done = folder / f"{file.name} {options.images} {options.answers} {255 * options.epsilon:g}.json"
        if not done.exists():
            done.write_text(json.dumps(_attack(file, network, spec, clean, x, y, epsilon=options.epsilon)))
        yield file.name, json.loads(done.read_text())


def _attack(
    file: File, network: nn.Module, spec: ModelSpec, clean: Tensor, x: Tensor, y: Tensor, *, epsilon: float
) -> dict[str, str]:
    if file.folder is not None:
        opened = open_attackable(file.path, device=CPU)
        alone, beside = opened.target(), open_attackable(file.folder, device=CPU).target()
    else:
        opened = open_attackable(file.path, device=CPU, data=spec.data, pixels="unit")
        alone = opened.target()
        beside = replace(alone, gradient_models={AS_TRAINED: frozen(network, CPU)})
    judge = one_by_one(alone.judge) if alone.image_by_image else alone.judge
    expected, logits = (all_logits(one, clean, batch_size=100) for one in (judge, _output(opened)))
    same = int((expected.argmax(1) == logits.argmax(1)).sum())
    apart = float((expected - logits).abs().max() / (expected.max() - expected.min()))
    ours, theirs = (_under_attack(one, x, y, epsilon) for one in (alone, beside))
    return {
        "same": f"{same} of {len(clean)}",
        "apart": f"{apart:.1e}",
        "clean": f"{100 * ours.clean_accuracy:.1f}",
        "alone": _robust(ours),
        "pytorch": _robust(theirs),
        "difference": f"{100 * (ours.robust_accuracy - theirs.robust_accuracy):+.1f}",
        "one": f"{int((theirs.robust & ~ours.robust).sum())}, {int((ours.robust & ~theirs.robust).sum())}",
    }


def _output(opened: OpenedModel) -> Callable[[Tensor], Tensor]:
    network = opened.gradient_model
    assert isinstance(network, TwinOnImages)
    # The twin as a network answers with logits where the file has probabilities.
    return lambda x: network.twin.values(network.form.apply(x), [network.twin.graph.output])[0]


def _under_attack(target: Target, x: Tensor, y: Tensor, epsilon: float) -> Evaluation:
    first, model = next(iter(target.gradient_models.items()))
    target = replace(target, gradient_models={first: model})
    suite = replace(find_suite("recheck"), drops_broken=True)  # the same worst case, in fewer passes
    return run_suite(target, x, y, suite=suite, epsilon=epsilon, device=CPU)


def _robust(found: Evaluation) -> str:
    return percent(found.robust_accuracy, wilson_interval(int(found.robust.sum()), found.images))


def _own(path: Path, folder: Path, formats: list[str]) -> Iterator[File]:
    for format_name in formats:
        out = folder / format_name
        if not out.exists():
            export_model(path, format_name=format_name, recheck=False, max_drift=1.0, device="cpu", out=out)
        yield File(format_name, next(out.glob("*.onnx")), out)


def _foreign(network: nn.Module, images: Tensor, folder: Path, nncf: str | None) -> Iterator[File]:
    source = _plain(network, images, folder / "float.onnx")
    yield File("float", source)
    for layout in ("QDQ", "QOperator"):
        for per_channel in (False, True):
            for kind in KINDS:
                name = f"{layout}, {'per channel' if per_channel else 'per tensor'}, {kind}"
                yield File(name, _static(source, images, folder / f"{name}.onnx", layout, per_channel, kind))
    path = folder / "dynamic.onnx"
    if not path.exists():
        quantize_dynamic(source, path)
    yield File("dynamic", path)
    source = _plain(nn.Sequential(network, nn.Softmax(dim=1)), images, folder / "float-softmax.onnx")
    yield File("float, ends in Softmax", source)
    for layout in ("QDQ", "QOperator"):
        name = f"{layout}, per channel, u8s8, ends in Softmax"
        yield File(name, _static(source, images, folder / f"{name}.onnx", layout, True, "u8s8"))
    if nncf is not None:
        path, stored = folder / "nncf.onnx", folder / "calibration.npy"
        if not path.exists():
            np.save(stored, images.numpy())
            subprocess.run([nncf, NNCF, folder / "float.onnx", stored, path], check=True, stdout=subprocess.DEVNULL)
        yield File("NNCF", path)


def _plain(network: nn.Module, images: Tensor, path: Path) -> Path:
    if not path.exists():
        torch.onnx.export(
            network.eval(),
            (images[:2],),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )
    return path


def _static(source: Path, images: Tensor, path: Path, layout: str, per_channel: bool, kind: str) -> Path:
    if not path.exists():
        activations, weights = (QuantType[f"Q{'UI' if one == 'u' else 'I'}nt8"] for one in kind[::2])
        quantize_static(
            source,
            path,
            Batches(images),
            quant_format=QuantFormat[layout],
            per_channel=per_channel,
            activation_type=activations,
            weight_type=weights,
        )
    return path


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Batches of 64 images for onnxruntime's calibration."""

    def __init__(self, images: Tensor) -> None:
        self._rest = iter(torch.split(images, 64))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        batch = next(self._rest, None)
        return None if batch is None else {"images": batch.numpy()}


if __name__ == "__main__":
    main()
