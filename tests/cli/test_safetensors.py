"""Safetensors: files of others are read as .pt files are, ours there and back, and damage is one line."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import robustq
from robustq.checkpoint import load_model
from robustq.errors import ModelFileError
from robustq.torch_file import read_checkpoint
from robustq.workflow.setup import open_source
from tests.cli.conftest import Run, check_refused


def raw(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(kind: str, *shape: int, begin: int = 0, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "truncated": (raw({"a": tensor("F32", 4, end=16)}, bytes(8)), "is no intact safetensors file"),
    "too long": (raw({"a": tensor("F32", 1, end=4)}, bytes(8)), "is no intact safetensors file"),
    "endless header": (struct.pack("<Q", 2**62) + b'{"a":1}', "is no intact safetensors file"),
    "deep header": (raw(b'{"a":' * 300 + b"1" + b"}" * 300), "is no intact safetensors file"),
    "overflowing shape": (raw({"a": tensor("F32", 2**40, 2**40, end=4)}, bytes(4)), "is no intact safetensors file"),
    "overlapping": (
        raw({"a": tensor("F32", 1, end=4), "b": tensor("F32", 1, end=4)}, bytes(4)),
        "is no intact safetensors file",
    ),
    "text": (b"not safetensors at all", "is no intact safetensors file"),
    "complex": (raw({"a": tensor("C64", 1, end=8)}, bytes(8)), "a is not a dense tensor"),
    "float8": (raw({"a": tensor("F8_E4M3", 4, end=4)}, bytes(4)), "a is not a dense tensor"),
    "our entry broken": (raw({"__metadata__": {"robustq": "{" * 50}}), "its metadata robustq cannot be read"),
    "our entry without its sum": (raw({"__metadata__": {"robustq": "{}"}}), "is damaged"),
    "our entry is a list": (raw({"__metadata__": {"robustq": "[1]"}}), "is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(tmp_path: Path, name: str) -> None:
    content, said = HOSTILE[name]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_checkpoint(path)
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_weights_of_others_load_as_their_pt_file_does(run: Run, digits_float: Path) -> None:
    state = {f"module.{name}": value for name, value in load_model(digits_float)[0].state_dict().items()}
    torch.save(state, "weights.pt")
    save_file(state, "weights.safetensors", metadata={"trained_by": "somebody", "best_acc": "33.3"})
    options = ("--bits", "4", "--recipe", "ptq", "--data", "digits")
    first, second = (open_source(Path(name), "digits") for name in ("weights.pt", "weights.safetensors"))
    assert first.spec == second.spec and first.stated is None and first.state.keys() == second.state.keys()
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    told = run("info", "weights.safetensors")
    assert second.stated == pytest.approx(0.333) and "stated  accuracy 33.3%" in told.out
    assert "network resnet8 · 77,754 parameters · float" in told.out and "trained_by: somebody" in told.out
    state["module.conv1.weight"][0] = float("nan")
    save_file(state, "nan.safetensors")
    check_refused(run("harden", "nan.safetensors", *options), "conv1.weight holds NaN or Inf")
    save_file({"body.weight": torch.ones(3)}, "other.safetensors")
    check_refused(run("harden", "other.safetensors", *options), "is a bare state dict of an unknown architecture")
    assert "network unknown · 3 parameters" in run("info", "other.safetensors").out


def test_a_hardened_model_there_and_back(run: Run, digits_w4a4: Path) -> None:
    path = Path("kept.safetensors")
    told = run("export", digits_w4a4, "--format", "safetensors", "--out", path)
    assert told.code == 0, told.err
    assert f"next    robustq attack {path}" in told.out.splitlines()
    network, spec, about = load_model(digits_w4a4)
    state = network.state_dict()
    again = load_model(path)
    assert again[1:] == (spec, about)
    assert all(torch.equal(value, again[0].state_dict()[name]) for name, value in state.items())
    plain = load_file(path)  # as any other program reads it
    assert plain.keys() == state.keys() and all(torch.equal(value, plain[name]) for name, value in state.items())

    shown = run("info", path, "--json").json
    assert (shown["kind"], shown["label"], shown["data"]) == ("model", "resnet8-w4a4", "digits")
    assert run("attack", path, "--suite", "recheck", "--images", "2", "--json").json["label"] == "resnet8-w4a4"
    first, second = (run("export", digits_w4a4, "--format", "safetensors", "--json").json for _ in range(2))
    assert Path(first["file"]).name == "resnet8-w4a4-odgq.safetensors" and first["sha256"] == second["sha256"]
    assert Path(second["file"]).name == "resnet8-w4a4-odgq-2.safetensors"


def test_any_flipped_bit_of_our_file_is_refused(digits_w4a4: Path, tmp_path: Path) -> None:
    path = robustq.export_weights(digits_w4a4, out=str(tmp_path / "own.safetensors")).file
    whole, draw = path.read_bytes(), random.Random(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(8), *draw.sample(range(8, length), 150), *draw.sample(range(length, len(whole)), 50)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError):
            load_model(path)
    path.write_bytes(whole)
    load_model(path)


def test_options_without_effect_and_other_endings(run: Run, digits_w4a4: Path) -> None:
    words = ("export", digits_w4a4, "--format", "safetensors")
    check_refused(run(*words, "--input", "uint8", "--no-recheck"), "--input, --recheck has no effect")
    check_refused(run(*words, "--out", "w.pt"), "--out w.pt does not end in .safetensors")
    Path("w.safetensors").write_text("mine")
    check_refused(run(*words, "--out", "w.safetensors"), "exists already")
