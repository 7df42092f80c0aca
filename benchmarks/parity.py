"""Parity of deployed files with PyTorch: every width in every format on real test images.

    python -m benchmarks.parity FLOAT.pt [--data cifar10] [--bits 8 4 3 2 1]
                                [--formats qonnx qcdq integer packed] [--images 5000] [--train-images 2000]

Each width is the float network quantized, trained naturally for one short epoch (parity needs no accuracy), written in
every format and checked as ``robustq export`` does. Rows: images with another class, mean and largest logit difference
as shares of the logit range, images further apart than 1e-4 of it, layers that run as integers and in float.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.output import head, make_parser, row
from robustq import progress
from robustq.workflow.export import export_model
from robustq.workflow.harden import harden_model


def main() -> None:
    """Train, export and print."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2, 1])
    parser.add_argument("--formats", nargs="+", default=["qonnx", "qcdq", "integer", "packed"])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--train-images", type=int, default=2000)
    options = parser.parse_args()
    progress.show(True)
    columns = ("another class", "mean, largest difference", "further apart", "integer, float")
    head("model", "format", "bytes", "run", *columns)
    with tempfile.TemporaryDirectory() as folder:
        _print(_export(options.model, "float", Path(folder) / "float", options))
        for bits in options.bits:
            trained = harden_model(
                options.model,
                bits=bits,
                recipe="natural",
                overrides=(f"train_images={options.train_images}", "epochs=1", "lr=0.02", "warmup_epochs=0"),
                data=options.data,
                out=Path(folder) / f"w{bits}",
            )
            for name in options.formats:
                _print(_export(Path(trained["checkpoint"]), name, Path(folder) / f"w{bits}-{name}", options))


def _export(model: Path, name: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    return export_model(
        model, format_name=name, images=options.images, recheck=False, data=options.data, out=out, device="cpu"
    ).to_dict()


def _print(found: dict[str, Any]) -> None:
    layers = f"{len(found['integer_layers'])}, {len(found['float_layers'])}"
    for run, agreement in found["parity"].items():
        differences = f"{agreement['mean_difference']:.1e}, {agreement['max_difference']:.1e}"
        others = f"{agreement['different_top1']} of {agreement['images']:,}"
        file = (found["label"], found["format"], f"{found['size_bytes']:,}")
        row(*file, run, others, differences, agreement["images_apart"], layers)
    for shortfall in found["shortfalls"]:
        print(f"FAILED {found['label']} {found['format']}: {shortfall}", flush=True)


if __name__ == "__main__":
    main()
