"""Files that are built to harm: each is refused in one line, at once and without their sizes in memory."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from robustq.checkpoint import load_model, save_model
from tests.cli import hostile
from tests.cli.conftest import Run, check_refused

ONE = ("--suite", "recheck", "--images", "1", "--epsilon", "0", "--device", "cpu")


@pytest.mark.parametrize("kind", hostile.SPECIAL)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.pt", ("info",)),
        ("a.onnx", ("info",)),
        ("a.npz", ("attack", "w4a4.pt", *ONE, "--data")),
        ("a.npz", ("attack", "w4a4.pt", "--replay")),
        ("a.toml", ("train", "--data", "digits", "--recipe")),
        ("a.toml", ("harden", "w4a4.pt", "--bits", "4", "--bits-per-layer")),
        ("config.json", ("info",)),
        ("bundle.json", ("info",)),
        ("images/0/x.png", ("attack", "w4a4.pt", *ONE, "--data")),
        ("runs/last-hardened", ("export",)),
    ],
)
def test_not_a_regular_file(
    run: Run, bundle: Path, digits_w4a4: Path, kind: str, name: str, words: tuple[str, ...]
) -> None:
    Path("w4a4.pt").symlink_to(digits_w4a4)
    path = Path(name)
    given = [path]
    if name == "bundle.json":
        path = hostile.edited_bundle(bundle, Path("copy")) / name
        path.unlink()
        given = [path.parent]
    elif name == "config.json":
        path = Path("run", name)
        given = [path.parent]
    elif name.startswith("images"):
        given = [hostile.image_folder(Path("images"))]
    elif name.startswith("runs"):
        given = []
    path.parent.mkdir(exist_ok=True)
    hostile.SPECIAL[kind](path)
    refused = run(*words, *given)
    if name.startswith("runs"):
        check_refused(refused, "no model given")
    else:
        check_refused(refused, "is not a regular file")


@pytest.mark.parametrize("name", hostile.TENSORS)
def test_tensors_that_are_not_plain(run: Run, digits_w4a4: Path, name: str) -> None:
    content = torch.load(digits_w4a4, weights_only=True)
    content["state"]["conv1.weight"] = hostile.TENSORS[name](content["state"]["conv1.weight"])
    torch.save(content, "a.pt")
    check_refused(run("info", "a.pt"), "a.pt: conv1.weight is not a dense tensor of real numbers")


def test_sizes_and_thresholds_out_of_range(run: Run, digits_w4a4: Path) -> None:
    content = torch.load(digits_w4a4, weights_only=True)
    torch.save({**content, "spec": {**content["spec"], "classes": 5_000_000}}, "a.pt")
    check_refused(run("info", "a.pt"), "it must be an integer from 1 to 100,000")
    name = next(name for name in content["state"] if name.endswith("log_threshold"))
    torch.save({**content, "state": {**content["state"], name: torch.tensor(100.0)}}, "a.pt")
    check_refused(run("info", "a.pt"), f"a.pt: {name} is 100, out of range")


@pytest.mark.slow
def test_a_pickle_that_grows(run: Run) -> None:
    grown: list[Any] = [0]
    for _ in range(30):
        grown = [grown, grown]
    torch.save({"a": grown}, "a.pt")
    check_refused(run("info", "a.pt"), "a.pt: holds more than weights")


def test_a_file_of_old_torch_is_taken_with_a_warning(run: Run, digits_w4a4: Path) -> None:
    content = torch.load(digits_w4a4, weights_only=True)
    torch.save(content, "old.pt", _use_new_zipfile_serialization=False)
    taken = run("info", "old.pt")
    assert taken.code == 0 and "robustq: warning: old.pt: has no checksum" in taken.err


def test_only_image_formats_of_cameras(run: Run, digits_w4a4: Path) -> None:
    words = ("attack", digits_w4a4, "--data", hostile.image_folder(Path("images")), *ONE)
    path = Path("images/0/0.png")
    path.write_bytes(hostile.EPS)
    check_refused(run(*words), "0.png cannot be read as an image (cannot identify image file")
    path.write_bytes(hostile.bits_of_one_colour(11_000))
    check_refused(run(*words), "11000x11000 is more than 100,000,000 pixels")


def test_links_are_followed_once(run: Run, digits_w4a4: Path) -> None:
    words = ("attack", digits_w4a4, "--data", hostile.image_folder(Path("images")), *ONE, "--images", "0", "--json")
    before = run(*words).json["images"]
    for name in ("loop", "again"):
        Path("images/0", name).symlink_to(".")
    Path("images/1/same.png").symlink_to("0.png")
    assert run(*words).json["images"] == before
    Path("images/0/up").symlink_to("..")
    check_refused(run(*words), "is also an image of images/0; remove the link")


def test_a_link_to_a_disk_ends(run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustq.data.image_files.MOST_FOLDERS", 20)
    data = hostile.image_folder(Path("images"))
    Path("images/0/disk").symlink_to("/usr")
    check_refused(run("attack", digits_w4a4, "--data", data, *ONE), "images/0 has links to over 20 folders")


@pytest.mark.parametrize("images", [5_000_000, 10**12])
def test_an_npz_of_zeros(run: Run, digits_w4a4: Path, images: int) -> None:
    hostile.data_bomb(Path("a.npz"), images=images, most=400_000_000)
    check_refused(run("attack", digits_w4a4, "--data", "a.npz", *ONE), "over 100 times its size")
    check_refused(run("attack", digits_w4a4, "--replay", "a.npz"), "over 100 times its size")


def test_broken_replay_files(run: Run, adversarial: Path, digits_w4a4: Path) -> None:
    def refused(line: str) -> None:
        check_refused(run("attack", digits_w4a4, "--replay", "a.npz"), line)

    with np.load(adversarial) as archive:
        arrays = dict(archive)
    for about, line in (
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "do not fit together"),
        ('{"label": 3}', "label of its about is int"),
    ):
        np.savez("a.npz", **{**arrays, "about": np.str_(about)})
        refused(line)
    with open("a.npz", "wb") as file:
        np.save(file, np.zeros(3))
    refused("cannot be read")
    whole = bytearray(adversarial.read_bytes())
    with zipfile.ZipFile(adversarial) as archive:
        for record in archive.infolist():
            whole[record.header_offset + 6] |= 1  # encrypted
    Path("a.npz").write_bytes(whole)
    refused("is damaged (its sha256")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('extends = "a\\u0000.toml"', "no such recipe file"),
        ('extends = "natural"\nepochs = 0x' + "f" * 5000, "an integer of more than 64 bits"),
        ("a" + ".a" * 5000 + " = 1", "nested too deeply"),
        ("a = " + "9" * 5000, "is not valid TOML"),
        ("# " + "x" * (17 << 20), "more than 16 MB"),
    ],
)
@pytest.mark.parametrize("words", [("train", "--recipe"), ("harden", "w4a4.pt", "--bits", "4", "--bits-per-layer")])
def test_toml(run: Run, digits_w4a4: Path, words: tuple[str, ...], text: str, line: str) -> None:
    Path("w4a4.pt").symlink_to(digits_w4a4)
    Path("a.toml").write_text(text)
    bits = text.startswith("extends") and "bits-per-layer" in words[-1]
    check_refused(run(*words, "a.toml", "--data", "digits"), "a.toml" if bits else line)


def test_a_long_row_of_recipes(run: Run) -> None:
    for number in range(50):
        Path(f"{number}.toml").write_text(f'extends = "{number + 1}.toml"')
    check_refused(run("train", "--recipe", "0.toml", "--data", "digits"), "extends more than 16 recipes")


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"float_layers": 3}, "float_layers is missing or has another form"),
        ({"format": ["integer"]}, "format is missing or has another form"),
        ({"recheck": {"flags": 3}}, "clean_accuracy is missing or has another form"),
        ({"shortfalls": [{}]}, "shortfalls is missing or has another form"),
        ({"drift": json.loads("[" * 500 + "]" * 500)}, "nested too deeply"),
    ],
)
def test_bundle_json_of_another_form(run: Run, bundle: Path, entries: dict[str, Any], line: str) -> None:
    check_refused(run("info", hostile.edited_bundle(bundle, Path("copy"), **entries)), line)


@pytest.mark.parametrize("name", hostile.GRAPHS)
@pytest.mark.parametrize("command", ["attack", "recheck"])
def test_a_file_of_another_graph(run: Run, bundle: Path, name: str, command: str) -> None:
    """The hash in bundle.json was edited to fit."""
    made = hostile.edited_bundle(bundle, Path("copy"), model=hostile.GRAPHS[name]().SerializeToString())
    refused = run(command, made, *(ONE if command == "attack" else ONE[2:]))
    expected = {
        "endless loop": "has the operator Loop",
        "constant of 6 GB": "makes a tensor of 1,500,000,000 values (big, by ConstantOfShape)",
        "declared 100 GB": "declares 25,000,000,000 values of big",
        "weights elsewhere": "keeps the values of big in another file",
        "fails while running": "last_layer",
        "wide kernel": "steps for one tensor (p, by Conv)",
        "wide pooling": "steps for one tensor (p, by MaxPool)",
    }
    check_refused(refused, expected.get(name, ".onnx"))


@pytest.mark.parametrize("name", ["constant of 6 GB", "constant of 100 GB", "product of 10 GB", "endless loop"])
def test_info_reads_sizes_and_computes_nothing(run: Run, name: str) -> None:
    onnx.save(hostile.GRAPHS[name](), "a.onnx")
    assert run("info", "a.onnx").code == 0


def test_names_are_shown_with_visible_codes(run: Run, digits_w4a4: Path, bundle: Path) -> None:
    model, spec, _ = load_model(digits_w4a4)
    save_model(Path("a.pt"), model, spec, info={hostile.ESCAPES: hostile.ESCAPES})
    made = hostile.graph(hostile.linear(output="y"), hostile.WEIGHT)
    made.producer_name = hostile.ESCAPES
    onnx.save(made, "a.onnx")
    hostile.edited_bundle(bundle, Path("copy"), not_for=[hostile.ESCAPES])
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"recipe": {"name": hostile.ESCAPES, "method": ""}}))
    for path in ("a.pt", "a.onnx", "copy", "run"):
        shown = run("info", path)
        assert shown.code == 0 and "\\u001b[31mred" in shown.out and "\\u202e" in shown.out
        assert shown.out.replace("\n", "").isprintable() and "\nFAILED" not in shown.out


def test_last_hardened_in_another_encoding(run: Run) -> None:
    Path("runs").mkdir()
    Path("runs/last-hardened").write_bytes("/ä".encode("utf-16"))
    check_refused(run("export"), "which is gone; give a model file")


def test_every_flipped_bit_of_an_own_file_is_named(
    run: Run, digits_w4a4: Path, bundle: Path, adversarial: Path
) -> None:
    """One in some hundreds; tests/test_files.py flips all of a small archive."""
    draw = np.random.default_rng(0)
    copy = hostile.edited_bundle(bundle, Path("copy"))
    Path("own.pt").write_bytes(digits_w4a4.read_bytes())
    Path("own.npz").write_bytes(adversarial.read_bytes())
    for words, path in (
        (("info", "own.pt"), Path("own.pt")),
        (("attack", digits_w4a4, "--replay", "own.npz"), Path("own.npz")),
        # The cards are texts for people and other tools, who may add to them.
        *((("info", copy), path) for path in copy.iterdir() if not path.name.startswith("card")),
    ):
        whole = path.read_bytes()
        for place in draw.integers(len(whole), size=20):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(draw.integers(8))
            path.write_bytes(flipped)
            check_refused(run(*words), path.name)
        path.write_bytes(whole)
