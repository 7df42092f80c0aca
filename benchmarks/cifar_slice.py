"""The whole job from the command line on a slice of CIFAR-10, as the Markdown of docs/results/cifar10-slice.md.

    python -m benchmarks.cifar_slice --data cifar10 [--images 5000] [--float-epochs 8] [--epochs 4]

Trains a float ResNet-20, fine-tunes it at 4 bits with ODG-Q and naturally, exports the hardened network and re-checks
the file. It shows that the job runs and what an epoch costs; so few epochs do not show the strength of the method.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.output import head, make_parser, percent, row


def main() -> None:
    """Run and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--judged", type=int, default=300)
    options = parser.parse_args()
    data = options.data if not os.path.exists(options.data) else os.path.abspath(options.data)
    sets = [f"train_images={options.images}", "flip=true", "batch_size=128", "monitor_images=200"]
    shared = [word for setting in sets for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        network = ("--data", data, "--architecture", "resnet20", "--set", f"epochs={options.float_epochs}")
        trained = _robustq(folder, "train", *network, *shared, "--out", "float")
        fine_tune = (*shared, "--set", f"epochs={options.epochs}", "--set", "lr=0.05", "--bits", "4")
        hardened = _robustq(folder, "harden", "float/best.pt", *fine_tune, "--out", "odgq")
        natural = _robustq(folder, "harden", "float/best.pt", "--recipe", "natural", *fine_tune, "--out", "natural")
        judged = ("--images", str(options.judged))
        exported = _robustq(folder, "export", "odgq/best.pt", *judged, "--no-recheck", "--out", "bundle")
        checked = _robustq(folder, "recheck", "bundle", *judged)
        twin = _robustq(folder, "attack", "natural/best.pt", "--suite", "recheck", *judged)
    head("model", "clean, 10,000 test images", "s an epoch")
    for name, run in (("float", trained), ("4-bit, ODG-Q", hardened), ("4-bit, natural", natural)):
        row(name, f"{100 * run['clean_accuracy']:.1f}", f"{run['seconds_per_epoch']:.1f}")
    print(f"\nODG-Q epoch / natural epoch: {hardened['seconds_per_epoch'] / natural['seconds_per_epoch']:.2f}\n")
    head(f"judge, {options.judged} images", "clean", "FGSM", "PGD-20", "margin-PGD-40", "worst case [95%]")
    for name, found in (("hardened, deployed integer file", checked), ("natural 4-bit, PyTorch", twin)):
        shares = [f"{100 * share:.1f}" for share in (found["clean_accuracy"], *found["attacks"].values())]
        row(name, *shares, percent(found["robust_accuracy"], found["interval"]))
    layers = f"integer layers {len(exported['integer_layers'])}, float layers {len(exported['float_layers'])}"
    print(f"\nfile {exported['size_bytes']:,} bytes; {layers}")
    for run, agreement in checked["parity"].items():
        print(
            f"- parity, {run}: {agreement['different_top1']} of {agreement['images']} differ, logits by "
            f"{agreement['mean_difference']:.1e} of their range in the mean, {agreement['max_difference']:.1e} at most"
        )
    print(f"- drift by folding: {exported['drift']['different_top1']} of {exported['drift']['images']} differ")


def _robustq(folder: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "robustq.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
