"""Bundles of models for every target, re-checked: docs/results/targets.md.

    python -m benchmarks.targets MODEL [MODEL ...] --out FOLDER [--images 300] [--answers 2000]

Each model is exported for each target of ``robustq export --targets`` and re-checked, with checks and the suite
`recheck` on --images test images. Runtimes in JavaScript are looked for in ``node_modules`` of this folder and in
NODE_PATH. FOLDER keeps bundles and rows; a second call goes on where the first one stopped.

Cells: who checked the file, and of --images those that got the network's class there; accuracy of the file without and
under attack as `recheck` counts it; the same adversarial images in the target's other runtimes; of --answers clean
images, those that onnxruntime in Node.js (native, WebAssembly) puts into the class of onnxruntime in Python; bytes of
the .onnx; checks that failed, in `export` and in `recheck`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.output import head, make_parser, percent, row

NODE = ("onnxruntime-node", "onnxruntime-web")


def main() -> None:
    """Export, re-check and print."""
    parser = make_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--answers", type=int, default=2000)
    options = parser.parse_args()
    from robustq.export.targets.schema import target_names

    options.out.mkdir(parents=True, exist_ok=True)
    head(
        *("model", "target", "checked by", "answers", "clean", "robust", "elsewhere", "Node.js", "WebAssembly"),
        *("bytes", "failed"),
    )
    for model in options.models:
        for target in target_names():
            name = f"{model.absolute().parent.name}-{target}"
            kept = options.out / f"{name}.json"
            if not kept.is_file():
                found = one_bundle(model, target, options.out / name, options)
                kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print_row(json.loads(kept.read_text(encoding="utf-8")))


def one_bundle(model: Path, target: str, out: Path, options: Any) -> dict[str, Any]:
    """Export for a target, re-check, and compare the runtimes of onnxruntime."""
    from robustq.workflow.export import export_model
    from robustq.workflow.recheck import recheck_bundle

    made = export_model(model, target=target, images=options.images, max_drift=0.05, out=out)
    again = recheck_bundle(made.bundle, images=options.images)
    return {
        "label": made["label"],
        "target": made["target"],
        "images": options.images,
        "accuracy": {key: again[key] for key in ("clean_accuracy", "clean_interval", "robust_accuracy", "interval")},
        "node": node_answers(made.files[0], made.bundle / "model.pt", options.answers),
        "bytes": made["size_bytes"],
        "shortfalls": {"export": list(made["shortfalls"]), "recheck": list(again["shortfalls"])},
    }


def node_answers(path: Path, model: Path, count: int) -> dict[str, Any]:
    """Runtime in Node.js -> images and different classes beside onnxruntime in Python; empty for QONNX."""
    from robustq.checkpoint import load_model
    from robustq.errors import ModelFileError
    from robustq.export.runtimes.answers import compare_with_onnxruntime
    from robustq.export.runtimes.registry import open_judge
    from robustq.export.session import OnnxModel
    from robustq.workflow.setup import data_for

    _, spec, _ = load_model(model)
    images, _ = data_for(spec, None, model).test.take(count)
    try:
        python = OnnxModel(path)
    except ModelFileError:  # QONNX
        return {}
    return {name: compare_with_onnxruntime(name, open_judge(name, path), python, images).to_dict() for name in NODE}


def print_row(found: dict[str, Any]) -> None:
    """One row of the table."""
    target, accuracy = found["target"], found["accuracy"]
    agreement = target["agreement"]
    same = "" if agreement is None else f"{agreement['images'] - agreement['different_top1']} of {agreement['images']}"
    others = []
    for one in target["replayed"]:
        counted = one["refused"] or percent(one["robust_accuracy"], one["robust_interval"])
        others.append(f"{one['runtime']} {one['version']}: {counted}")
    node = [
        f"{one['images'] - one['different']:,} of {one['images']:,}" if (one := found["node"].get(name)) else ""
        for name in NODE
    ]
    failed = [f"{job}: {fall}" for job, falls in found["shortfalls"].items() for fall in falls]
    row(
        *(found["label"], target["name"], target["by"], same),
        percent(accuracy["clean_accuracy"], accuracy["clean_interval"]),
        percent(accuracy["robust_accuracy"], accuracy["interval"]),
        *("; ".join(others), *node, f"{found['bytes']:,}", "; ".join(failed)),
    )


if __name__ == "__main__":
    main()
