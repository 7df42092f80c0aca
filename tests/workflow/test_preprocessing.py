"""How images of a folder became square, and which were left out: kept in the model, and done again by later jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import robustq
from robustq.checkpoint import load_model
from robustq.errors import RobustqWarning
from robustq.models.preprocessing import preprocessing_of
from robustq.models.spec import ModelSpec, build_model
from robustq.report.info import description_lines
from tests.data.images import write_images
from tests.models.small_nets import small_spec

FAST = ("epochs=1", "monitor_images=8", "image_size=8", "batch_size=10")


def test_a_folder_is_resized_and_read_as_in_training(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    for part, seed in (("train", 0), ("test", 1)):
        write_images(folder / part, {"a": 12, "b": 12}, size=(16, 12), seed=seed)
        (folder / part / "b" / "05.png").write_bytes(b"no image")
    with pytest.warns(RobustqWarning, match="skipped 1 of 24"):
        made = robustq.train_model(
            architecture="resnet8",
            data=str(folder),
            overrides=FAST,
            resize="squash",
            skip_bad_images=True,
            out=str(tmp_path / "run"),
        )
    spec = load_model(made.checkpoint)[1]
    assert (spec.resize, spec.skip_bad_images, spec.image_size) == ("squash", True, 8)

    with pytest.warns(RobustqWarning, match="skipped 1 of 24"):  # without the options
        exported = robustq.export_model(
            made.checkpoint, format_name="float", images=0, recheck=False, max_drift=1.0, out=tmp_path / "bundle"
        )
    file = str(exported.files[0])
    session = onnxruntime.InferenceSession(file)
    right = 0
    for path in sorted((folder / "test").rglob("*.png")):
        if path.stat().st_size > 20:
            seen = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BILINEAR), np.float32) / 255
            logits = session.run(None, {"images": seen.transpose(2, 0, 1)[None]})[0]
            right += int(logits.argmax()) == ("a", "b").index(path.parent.name)
    told = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    counted = json.loads(told["robustq.accuracy"])
    assert counted["images"] == 23 and counted["clean_accuracy"] == right / 23
    with pytest.warns(RobustqWarning, match="skipped 1 of 24"):
        again = robustq.recheck_bundle(exported.bundle, images=0, epsilon="0")
        found = robustq.attack_model(exported.bundle, suite="recheck", images=0, epsilon=0.0)
    assert again["clean_accuracy"] == found["clean_accuracy"] == right / 23

    stated = json.loads(told["robustq.preprocessing"])
    wanted = {"channels": "RGB", "resize": "squash", "size": [8, 8], "range": "pixel / 255", "mean": None}
    assert {key: stated[key] for key in wanted} == wanted
    assert (
        exported["preprocessing"]
        == stated
        == json.loads((exported.bundle / "bundle.json").read_text())["preprocessing"]
    )
    line = "RGB, whole image scaled to 8x8, pixel / 255"
    for path, label in ((made.checkpoint, "images"), (exported.bundle, "images"), (Path(file), "before")):
        assert f"{label}  {line}" in description_lines(robustq.describe_file(path))


def test_a_folder_is_read_once_for_weights_of_another_program(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    for part in ("train", "test"):
        write_images(folder / part, {"a": 12, "b": 12}, size=(8, 8))
    (folder / "train" / "b" / "05.png").write_bytes(b"no image")
    spec = replace(small_spec(32), classes=2, channels=3, class_names=("a", "b"))
    torch.save(build_model(spec).state_dict(), tmp_path / "weights.pth")
    with pytest.warns(RobustqWarning) as found:
        robustq.harden_model(
            tmp_path / "weights.pth",
            bits=4,
            recipe="ptq",
            overrides=("image_size=8",),
            data=str(folder),
            skip_bad_images=True,
            checks=False,
            out=tmp_path / "run",
        )
    assert len([one for one in found if "skipped 1 of 24" in str(one.message)]) == 1


def test_specs_of_older_files_and_what_a_device_must_do() -> None:
    stored = small_spec(4).to_dict()
    for name in ("resize", "skip_bad_images"):
        del stored[name]
    spec = ModelSpec.from_dict(stored)
    assert (spec.resize, spec.skip_bad_images) == (None, False) and preprocessing_of(spec)["resize"] == "none"
    stored |= {"resize": "short-side:256", "image_size": 224, "channels": 3}
    stored["normalisation"] = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    found = preprocessing_of(ModelSpec.from_dict(stored), pixels="uint8")
    assert found == {
        "channels": "RGB",
        "resize": "short-side",
        "shorter_side": 256,
        "interpolation": "bilinear, antialiased",
        "crop": "centre",
        "size": [224, 224],
        "range": "pixels 0 to 255",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "mean_and_std_applied_by": "the network",
    }
