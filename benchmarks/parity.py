"""Do deployed files give PyTorch's answers? Every width in every format on real test images.

    python -m benchmarks.parity FLOAT.pt [--data cifar10] [--bits 8 4 3 2 1]
                                [--formats qonnx qcdq integer packed] [--images 5000] [--train-images 2000]

Each width is the float network quantized and trained naturally for one short epoch (on so few images that accuracy
means little; parity does not ask for it), then written in every format and proved as ``robustq export`` does. One line
a file and way of running it: images with another class, mean and largest logit difference as shares of the logit range,
images further apart than 1e-4 of it, and the layers that run as integers and in float.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from robustq import progress
from robustq.workflow.export import export_model
from robustq.workflow.train import harden_model


def main() -> None:
    """Train, export and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2, 1])
    parser.add_argument("--formats", nargs="+", default=["qonnx", "qcdq", "integer", "packed"])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--train-images", type=int, default=2000)
    options = parser.parse_args()
    progress.show(True)
    print(
        "| model | format | bytes | run | another class | mean, largest difference | further apart | integer, float |"
    )
    print("|---|---|---|---|---|---|---|---|")
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
        print(
            f"| {found['label']} | {found['format']} | {found['size_bytes']:,} | {run} "
            f"| {agreement['different_top1']} of {agreement['images']:,} | {differences} | {agreement['images_apart']} "
            f"| {layers} |",
            flush=True,
        )
    for fall in found["shortfalls"]:
        print(f"FAILED {found['label']} {found['format']}: {fall}", flush=True)


if __name__ == "__main__":
    main()
