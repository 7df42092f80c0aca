"""The kit: a folder beside the deployed file with which the device checks it, with numpy and onnxruntime alone.

It holds check.py, images.npz (clean and adversarial images, their labels, and the workstation's answers) and kit.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from robustq.data import to_float
from robustq.data.splits import evenly_spaced
from robustq.evaluation.accuracy import predict
from robustq.export.session import OnnxModel
from robustq.export.timing import cpu_name
from robustq.seals import sha256

KIT = "kit"

BATCH = 100

LARGEST_IMAGES, MOST_IMAGES = 16 << 20, 500
"""Bytes of all images of a kit, and their number at most."""


def write_kit(
    folder: Path, file: Path, images: Tensor, labels: Tensor, x_adv: Tensor, *, about: dict[str, Any]
) -> Path:
    """Write ``folder``/kit for an .onnx file of that folder which onnxruntime can run.

    Args:
        images, labels, x_adv: uint8 (N, C, H, W), int64 (N,), and the worst adversarial image of each; evenly spaced
            ones are taken, at most :data:`MOST_IMAGES`.
        about: further entries of kit.json in JSON types, such as label, data and epsilon.
    """
    fitting = max(LARGEST_IMAGES // (2 * images[0].numel()), 1)
    rows = evenly_spaced(len(images), min(fitting, MOST_IMAGES))
    clean, labels, x_adv = images[rows], labels[rows], x_adv[rows]
    judge = OnnxModel(file)
    answers = [predict(judge, to_float(some), batch_size=BATCH) for some in (clean, x_adv)]
    right = [int((one == labels).sum()) for one in (answers[0], torch.where(answers[0] == labels, answers[1], -1))]
    kit = folder / KIT
    kit.mkdir()
    np.savez_compressed(
        kit / "images.npz",
        clean=clean.numpy(),
        adversarial=x_adv.numpy(),
        labels=labels.numpy(),
        clean_answers=answers[0].numpy(),
        adversarial_answers=answers[1].numpy(),
    )
    facts = {
        "file": file.name,
        "sha256": {file.name: sha256(file), "images.npz": sha256(kit / "images.npz")},
        "input": "uint8" if judge.takes_uint8 else "float",
        "images": len(rows),
        "clean_right": right[0],
        "robust_right": right[1],
        "workstation": {"cpu": cpu_name(), "onnxruntime": onnxruntime.__version__},
        **about,
    }
    (kit / "kit.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("check.py"), kit / "check.py")
    return kit
