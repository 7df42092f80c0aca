"""Bad input: one line that names the value and the way out, exit 2, nothing written, no traceback.

The tests of recipes, data and checkpoints hold every fault of these; here is one of a kind, from the command line.
"""

from __future__ import annotations

import importlib
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robustq.checkpoint import load_model, save_model
from robustq.models.spec import build_model
from tests.cli.conftest import FAST_TRAIN, Run, check_refused


class Net(nn.Module):
    """A user's own class, which a whole pickled module names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


class Payload:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> Any:
        return subprocess.call, (["touch", "ran"],)


def write_images(folder: Path, labels: int, each: int) -> None:
    for label in range(labels):
        (folder / str(label)).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(np.full((8, 8), 16 * label + number, np.uint8)).save(folder / str(label) / f"{number}.png")


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory: pytest.TempPathFactory, digits_float: Path, digits_w4a4: Path) -> Path:
    """One of each: made once, copied for every case."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.pt").write_bytes(digits_w4a4.read_bytes()[:5000])
    (folder / "text.pt").write_text("not a model")
    (folder / "taken").mkdir()
    shutil.copy(digits_float, folder / "float.pt")
    shutil.copy(digits_w4a4, folder / "w4a4.pt")
    shutil.copytree(digits_w4a4.parent, folder / "run")
    content = torch.load(digits_w4a4, weights_only=True)
    torch.save({**content, "spec": {**content["spec"], "data": "/gone/faces.npz"}}, folder / "moved.pt")
    torch.save(dict(load_model(digits_float)[0].state_dict()), folder / "weights.pt")
    torch.save(Net(), folder / "module.pt")
    torch.save(Payload(), folder / "payload.pt")
    (folder / "payload.pkl").write_bytes(pickle.dumps(Payload()))
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), folder / "script.pt")  # type: ignore[no-untyped-call]
    small = replace(load_model(digits_w4a4)[1], image_size=4)
    save_model(folder / "four-pixels.pt", build_model(small), small)
    pixels, labels = np.zeros((30, 4, 4), np.uint8), np.arange(30) % 10
    np.savez(folder / "four.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    (folder / "deep.toml").write_text("a = " + "[" * 5000)
    write_images(folder / "images", labels=10, each=5)
    (folder / "images" / "3" / "2.png").write_bytes(b"no image")
    return folder


H4 = ("harden", "float.pt", "--bits", "4")
CASES: list[tuple[tuple[str, ...], str]] = [
    # model files
    (("harden", "truncated.pt", "--bits", "4"), "truncated.pt: is broken or truncated"),
    (("harden", "taken", "--bits", "4"), "taken: is a folder"),
    (("export", "run"), "give the .pt file in it: run/best.pt"),
    (("attack", "run"), "is a run folder, not an export folder; give the model in it: run/best.pt"),
    (("recheck", "run"), "run: holds 0 .onnx files"),
    (("harden", "payload.pt", "--bits", "4"), "payload.pt: holds more than weights (commands.call), and loading"),
    (("harden", "payload.pkl", "--bits", "4", "--trust-pickle"), "payload.pkl: is not a torch or safetensors file"),
    (("harden", "module.pt", "--bits", "4"), "robustq harden FILE --trust-pickle"),
    (("harden", "module.pt", "--bits", "4", "--trust-pickle"), "unknown architecture (no conv1.weight and fc.weight)"),
    (("harden", "script.pt", "--bits", "4"), "script.pt: is a TorchScript file"),
    (("harden", "x" * 300, "--bits", "4"), "x" * 300),
    # options
    (("harden", "float.pt", "--bits", "5"), "bits 5 are not in the table"),
    ((*H4, "--epsilon", "nan"), "epsilon 'nan'"),
    (("recheck", "taken", "--epsilon", "-8/255"), "epsilon '-8/255' is outside [0, 1]"),
    ((*H4, "--device", "cuda:99"), "device 'cuda:99' is not there"),
    ((*H4, "--device", "mps"), "device 'mps' is not supported; give cpu, cuda or cuda:0"),
    (("attack", "w4a4.pt", "--suite", "standart"), "unknown suite 'standart'"),
    (("attack", "w4a4.pt", "--images", "-3"), "-3"),
    (("atack", "w4a4.pt"), "No such command 'atack'"),
    (("attack", "w4a4.pt", "--epsilonn", "1"), "--epsilonn"),
    # recipes and data
    (("harden", "weights.pt", "--bits", "4"), "is a bare state dict (resnet8, 10 classes)"),
    ((*H4, "--recipe", "odqg"), "nearest: odgq"),
    ((*H4, "--recipe", "deep.toml"), "deep.toml: is not valid TOML"),
    ((*H4, "--set", "crop_padding=8"), "crop_padding = 8 is no less than the side"),
    ((*H4, "--set", "epochs=" + "9" * 5000), "epochs = "),
    ((*H4, "--data", "digit"), "did you mean digits"),
    (("attack", "moved.pt"), "made on /gone/faces.npz, which is missing; name its new place with --data NEW"),
    ((*H4, "--data", "four.npz"), "was made for 8 pixels a side"),
    (
        ("harden", "four-pixels.pt", "--bits", "4", "--data", "four.npz", "--set", "batch_size=13"),
        "leaves a last batch of one image (27 training images)",
    ),
    # places, and what is missing
    ((*H4, "--out", "taken"), "taken exists already"),
    ((*H4, "--out", "text.pt/run"), "--out text.pt/run cannot be written below"),
    (("quickstart", "--out", "taken"), "taken exists already"),
    (("harden",), "harden needs the MODEL"),
    (("train", "--architecture", "resnet8"), "names no data"),
    (("train", "--data", "digits"), "names no architecture"),
    (("export",), "no model given"),
    (("export", "w4a4.pt", "--format", "qonxx"), "unknown format 'qonxx'"),
    (("export", "float.pt", "--format", "integer"), "quantize it first"),
    (("export", "w4a4.pt", "--format", "float"), "is quantized, and float holds 32-bit networks only"),
    (("export", "w4a4.pt", "--format", "qonnx", "--input", "uint8"), "--input uint8 is not known to qonnx"),
    (("export", "w4a4.pt", "--batch-norm", "keep"), "--batch-norm keep is not known to integer"),
]


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "expected"), CASES, ids=lambda value: " ".join(value)[:80] if type(value) is tuple else ""
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    run: Run, bad_files: Path, arguments: tuple[str, ...], expected: str
) -> None:
    for entry in bad_files.iterdir():
        Path(entry.name).symlink_to(entry)
    before, before_there = tree(Path.cwd()), tree(bad_files)
    check_refused(run(*arguments), expected)
    assert tree(Path.cwd()) == before and tree(bad_files) == before_there


def test_no_code_of_a_pickle_runs_without_trust(run: Run, bad_files: Path) -> None:
    for command in (("harden", "--bits", "4"), ("attack",), ("export",)):
        for name in ("payload.pt", "payload.pkl"):
            assert run(command[0], bad_files / name, *command[1:]).code == 2
    assert not Path("ran").exists()
    # The payload is a real one: with trust it runs, and what it leaves is no model.
    assert run("harden", bad_files / "payload.pt", "--bits", "4", "--trust-pickle").code == 2
    assert Path("ran").exists()


OWN_CLASS = """
from torch import nn

class Wrapped(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.module = network
"""


def test_a_whole_module_is_taken_with_trust(run: Run, digits_float: Path) -> None:
    """Its class is looked for in the working folder, as Python does for a script."""
    Path("own_class.py").write_text(OWN_CLASS)
    sys.path.append(str(Path.cwd()))
    try:
        own_class = importlib.import_module("own_class")
        torch.save(own_class.Wrapped(load_model(digits_float)[0]), "module.pt")
    finally:
        sys.path.remove(str(Path.cwd()))
        del sys.modules["own_class"]
    asked = ("harden", "module.pt", "--bits", "8", "--data", "digits", *FAST_TRAIN, "--json")
    check_refused(run(*asked), "module.pt: holds more than weights (own_class.Wrapped)")
    taken = run(*asked, "--trust-pickle")
    assert taken.code == 0, taken.err
    del sys.modules["own_class"]
    Path("own_class.py").unlink()
    check_refused(
        run(*asked, "--trust-pickle"), "needs code that cannot be imported here (No module named 'own_class')"
    )


def test_a_quantized_model_at_32_bits_says_what_it_means(run: Run, digits_w4a4: Path) -> None:
    outcome = run("harden", digits_w4a4, "--bits", "32", "--recipe", "natural", *FAST_TRAIN)
    assert outcome.code == 0, outcome.err
    assert "the quantizers are dropped and the float weights behind them are trained" in outcome.err


def test_bad_images_are_skipped_when_asked(run: Run, bad_files: Path, digits_float: Path) -> None:
    data = bad_files / "images"
    options = ("--data", data, "--skip-bad-images", "--set", "epochs=1", "--device", "cpu", "--json")
    outcome = run("harden", digits_float, "--bits", "8", *options)
    assert outcome.code == 0, outcome.err
    assert f"robustq: warning: skipped 1 of 50 images that cannot be read: {data / '3' / '2.png'}" in outcome.err
    few = ("--images", "5", "--epsilon", "0")
    again = run("attack", outcome.json["checkpoint"], *few)  # the model remembers that it skipped
    assert again.code == 0 and "robustq: warning: skipped 1 of 50 images" in again.err
    check_refused(run("attack", digits_float, "--data", data, *few), "2.png cannot be read as an image")
