"""Write an entry of the zoo from a run, its deployed file and the count under attack.

    python -m benchmarks.zoo_entry NAME RUN ATTACK.json --summary TEXT --hardware TEXT --command TEXT... \
        [--onnx FILE] [--images NPZ] [--data cifar10]

Without --onnx the entry is best.pt (or --checkpoint) of the run with weights in float16, else that deployed file.
ATTACK.json is the result of `robustq attack` on the very file (write the entry once, attack it, write it again). The
name of the data set replaces the path that the run was given. `--images` are those that an attack of 100 images saved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.output import make_parser
from robustq.checkpoint import load_model, save_state
from robustq.evaluation.adversarial_images import AdversarialImages
from robustq.files import write_text_atomically
from robustq.seals import sha256
from robustq.zoo import FOLDER

TAKEN = ("suite", "judge", "images", "epsilon", "clean_accuracy", "clean_interval", "robust_accuracy", "interval")
"""Keys of an attack's result that a card repeats."""


HELD_OUT = ("holdout_clean_accuracy", "holdout_pgd10_accuracy")
ABOUT = ("label", "suite", "seed", "robust_accuracy")
"""What is kept of a model file and of adversarial images: nothing with a path of the machine."""


def main() -> None:
    """Write NAME.json and its files into the zoo."""
    parser = make_parser(__doc__)
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    parser.add_argument("attack", type=Path, nargs="?", help="none: write the model alone, to be attacked")
    parser.add_argument("--checkpoint", default="best.pt")
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--summary", default="")
    parser.add_argument("--hardware", default="")
    parser.add_argument("--command", nargs="+", default=[])
    options = parser.parse_args()
    config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    result = json.loads((options.run / "result.json").read_text(encoding="utf-8"))
    model = FOLDER / f"{options.name}{'.pt' if options.onnx is None else '.onnx'}"
    network, spec, info = load_model(options.run / options.checkpoint)
    if options.onnx is None:
        halves = {
            name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
        }
        kept: dict[str, Any] = {
            key: info[key] for key in ("holdout_clean_accuracy", "holdout_pgd10_accuracy") if key in info
        }
        save_state(model, halves, replace(spec, data=options.data), info=kept)
    else:
        shutil.copyfile(options.onnx, model)
    if options.attack is None:
        return
    found = json.loads(options.attack.read_text(encoding="utf-8"))
    card: dict[str, Any] = {
        "name": options.name,
        "summary": options.summary,
        "file": model.name,
        "sha256": sha256(model),
        "size_bytes": model.stat().st_size,
        "architecture": spec.architecture,
        "data": options.data,
        "weight_bits": spec.weight_bits,
        "act_bits": spec.act_bits,
        **{key: found[key] for key in TAKEN},
        "flags": [flag["name"] for flag in found["flags"]],
        "verdict": found["verdict"],
        "recipe": {key: value for key, value in config["recipe"].items() if value is not None},
        "seed": config["seed"],
        "epoch": result["best_epoch"] if options.checkpoint == "best.pt" else result["epochs_done"],
        "hours": round(result["seconds_per_epoch"] * result["epochs_done"] / 3600, 2),
        "hardware": options.hardware,
        "commands": options.command,
        "versions": config["versions"],
    }
    if options.images is not None:
        images = FOLDER / f"{options.name}.npz"
        images.unlink(missing_ok=True)
        loaded = AdversarialImages.load(options.images)
        about: dict[str, Any] = {
            key: loaded.about[key] for key in ("label", "suite", "seed", "robust_accuracy") if key in loaded.about
        }
        replace(loaded, data=options.data, about=about).save(images)
        card |= {"images_sha256": sha256(images), "replayed": _replayed(loaded)}
    write_text_atomically(FOLDER / f"{options.name}.json", json.dumps(card, indent=1) + "\n")


def _chosen(found: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: found[key] for key in keys if key in found}


def _replayed(images: AdversarialImages) -> dict[str, int]:
    return {"images": len(images.labels), "right": int((~images.broken).sum())}


if __name__ == "__main__":
    main()
