"""Command lines and files for tests/cli/test_fuzz.py: each maker draws one, writes its file, and returns the words."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustq.export.bundle import MODEL, RECORD
from tests.cli import hostile

ONE = ("--suite", "recheck", "--images", "1", "--epsilon", "0", "--device", "cpu")
# Cheap however much of a drawn command line turns out to be right. They come last, and the last one counts.
CHEAP = ("--set", "epochs=1", "--set", "train_images=20", "--set", "monitor_images=5", "--device", "cpu")
NASTY = (
    *("", " ", "-", "--", "nan", "-1", "0", "1e999", "8/255", "8/0", "../..", "~", "%s{0}", "\n", "[[", "=", "a.b.c=1"),
    *("9" * 400, "a" * 5000, "lr=" + "9" * 5000, "ä€😀", "\x1b[31m", "\udcff", "summary='''", "none.pt", "w4a4.pt"),
    *("float.pt", "text.pt", "folder", "digits", "odgq", "epochs=1", "odgq.domains=1e9", "batch_size=10000000000"),
)
# Option -> values that are right somewhere; half of what is drawn comes from here, so that calls go deep.
VALUES: dict[str, tuple[str, ...]] = {
    "--recipe": ("odgq", "natural", "digits/resnet8-w4a4-odgq"),
    "--data": ("digits", "folder"),
    "--architecture": ("resnet8",),
    "--bits": ("8", "4", "32", "1"),
    "--set": ("lr=0.01", "odgq.domains=2", "schedule=steps", "batch_size=7"),
    "--seed": ("1", "4294967295"),
    "--device": ("cpu",),
    "--epsilon": ("0", "8/255", "1"),
    "--images": ("1",),
    "--suite": ("recheck",),
    "--epsilons": ("0,8/255",),
    "--surrogate": ("float.pt", "text.pt"),
    "--control": ("float.pt", "folder"),
    "--replay": ("text.pt", "folder"),
    "--save-adversarial": ("folder", "text.pt/x"),
    "--require": ("0", "1"),
    "--format": ("qcdq", "integer"),
    "--out": ("folder", "text.pt/x"),
    "--resume": ("folder",),
    "--trust-pickle": (),
    "--skip-bad-images": (),
    "--json": (),
    "--quiet": (),
    "--verbos": (),
    "--version": (),
}
SHARED = "--data --seed --device"
OPTIONS = {
    "train": f"{SHARED} --recipe --architecture --bits --set --resume",
    "harden": f"{SHARED} --recipe --bits --epsilon --set --trust-pickle --resume",
    "attack": f"{SHARED} --suite --epsilon --epsilons --images --require --skip-bad-images --surrogate --control "
    "--replay --save-adversarial",
    "export": f"{SHARED} --format --epsilon --images",
    "recheck": f"{SHARED} --epsilon --images --out",
    "info": "--json --quiet --verbos",
    "recipes": "--json --seed",
    "nothing": "--version --quiet",
}
# A quantized network takes a quarter of a second to build, a float one milliseconds: most calls need only the latter.
BUNDLES = ("bundle", "float-bundle", "float-bundle", "float-bundle")
ARGUMENTS = {"train": (), "recipes": ("odgq", "natural"), "nothing": ()}


def command_line(draw: random.Random, folder: Path) -> list[str]:
    command = draw.choice(list(OPTIONS))
    words = [command, *(("--suite", "recheck", "--no-surrogates") if command == "attack" else ())]
    usual: tuple[str, ...] = ARGUMENTS.get(command, ("w4a4.pt", *["float.pt"] * 4))
    if draw.random() < 0.7:
        words += draw.choices(usual, k=min(len(usual), 1))
    else:
        words += draw.choices(NASTY, k=draw.randrange(3))
    if command == "train" and draw.random() < 0.7:
        words += ["--data", "digits", "--architecture", "resnet8"]
    for option in draw.choices(OPTIONS[command].split(), k=draw.randrange(4)):
        right = VALUES[option]
        words.append(option)
        if right or draw.random() < 0.2:
            words.append(draw.choice(right if right and draw.random() < 0.6 else NASTY))
    if command in ("train", "harden"):
        words += CHEAP
    if command in ("attack", "export"):
        words += ["--images", "1"] + (["--no-recheck"] if command == "export" else [])
    return [*draw.choice((("-q",), (), (), ())), *words]


def changed(draw: random.Random, content: Any) -> Any:
    """A model file of the right kind with a value or two replaced."""
    odd: tuple[Any, ...] = (None, -1, 0, 10**9, 1.5, "x", "", [], {}, True, torch.zeros(2), "../" * 40, float("nan"))
    content = {**content, "spec": dict(content["spec"]), "state": dict(content["state"])}
    for _ in range(draw.randrange(1, 3)):
        table = draw.choice((content, content["spec"], content["spec"], content["state"]))
        if isinstance(table, dict) and table:
            key = draw.choice(list(table))
            if draw.random() < 0.2:
                del table[key]
            else:
                table[key] = draw.choice(odd)
        if not isinstance(content.get("spec"), dict) or not isinstance(content.get("state"), dict):
            break
    return content


def model_file(draw: random.Random, folder: Path) -> list[str]:
    whole = (folder / draw.choice(("w4a4.pt", "float.pt"))).read_bytes()
    kind = draw.randrange(3)
    if kind == 0:
        Path("fuzzed.pt").write_bytes(hostile.damaged(draw, whole))
    elif kind == 1:
        Path("fuzzed.pt").write_bytes(hostile.repacked(draw, whole, "data.pkl"))
    else:
        torch.save(changed(draw, torch.load(io.BytesIO(whole), weights_only=True)), "fuzzed.pt")
    return draw.choice(
        (
            ["info", "fuzzed.pt"],
            ["attack", "fuzzed.pt", *ONE],
            ["harden", "fuzzed.pt", "--bits", "8", "--data", "digits", *CHEAP],
            ["export", "fuzzed.pt", "--images", "1", "--no-recheck"],
        )
        if draw.random() < 0.3
        else (["info", "fuzzed.pt"], ["attack", "fuzzed.pt", *ONE])
    )


def safetensors(draw: random.Random, folder: Path) -> list[str]:
    """Weights of another program, or of ours, with a damaged file or a changed header."""
    source = draw.choice(("own.safetensors", "foreign.safetensors", "foreign.safetensors"))
    whole = Path(source).read_bytes()
    if draw.random() < 0.5:
        content = hostile.damaged(draw, whole)
    else:
        size = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + size])
        odd: tuple[Any, ...] = (None, -1, 2**63, [2**40, 2**40], "F8_E5M2", "C64", [8, 0], [0, 2**50], {}, {"a": "b"})
        for _ in range(draw.randrange(1, 4)):
            entry = header[draw.choice(list(header))]
            entry[draw.choice(list(entry))] = draw.choice(odd)
        text = draw.choice((*[json.dumps(header)] * 8, *DEEP)).encode()
        length = draw.choice((*[len(text)] * 8, 2**62, 0))
        content = length.to_bytes(8, "little") + text + whole[8 + size :]
    Path("fuzzed.safetensors").write_bytes(content)
    return draw.choice(
        (
            ["info", "fuzzed.safetensors"],
            ["attack", "fuzzed.safetensors", *ONE],
            ["harden", "fuzzed.safetensors", "--bits", "8", "--data", "digits", *CHEAP],
        )
    )


def npz(draw: random.Random, folder: Path) -> list[str]:
    arrays: dict[str, Any] = {
        "x_train": np.zeros((20, 8, 8), np.uint8),
        "y_train": np.arange(20) % 10,
        "x_test": np.zeros((10, 8, 8), np.uint8),
        "y_test": np.arange(10),
    }
    kind = draw.randrange(3)
    if kind == 2:
        odd: tuple[Any, ...] = (
            *(np.zeros((0, 8, 8), np.uint8), np.full((20, 8, 8), np.nan), np.array(3), np.array(["a"])),
            *(np.array([{"a": 1}]), np.full(20, 2**63, np.uint64), np.arange(20) - 5, np.zeros(20, bool)),
            *(np.zeros((20, 8, 8, 3, 1), np.uint8), np.zeros(20, complex), np.zeros(20, "datetime64[s]")),
        )
        for _ in range(draw.randrange(1, 3)):
            arrays[draw.choice(list(arrays))] = draw.choice(odd)
    made = io.BytesIO()
    (np.savez_compressed if draw.random() < 0.3 else np.savez)(made, **arrays)
    whole = made.getvalue()
    if kind == 0:
        whole = hostile.damaged(draw, whole)
    if kind == 1:
        whole = hostile.repacked(draw, whole, draw.choice(("x_train.npy", "y_train.npy", "y_test.npy")))
    Path("fuzzed.npz").write_bytes(whole)
    return ["attack", "float.pt", "--data", "fuzzed.npz", *ONE]


DEEP = "[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 2000


def replay(draw: random.Random, folder: Path) -> list[str]:
    with np.load("own.npz") as archive:
        arrays = dict(archive)
    odd: tuple[Any, ...] = (
        *(np.zeros(0), np.array(3), np.full(10, 2**63, np.uint64), np.str_("{}"), np.str_(draw.choice(DEEP))),
        *(np.array([{"a": 1}]), np.str_('{"robust_accuracy": "x"}'), np.full(10, np.nan), np.bytes_(b"a")),
        np.str_(json.dumps({"label": hostile.ESCAPES})),
    )
    kind = draw.choice((0, 1, 1, 1, 2, 2, 3, 3))
    if kind == 0:
        hostile.data_bomb(Path("fuzzed.npz"), images=10**15, most=140_000_000)
    elif kind == 1:
        Path("fuzzed.npz").write_bytes(hostile.damaged(draw, Path("own.npz").read_bytes()))
    else:
        arrays[draw.choice(list(arrays))] = draw.choice(odd)
        made = io.BytesIO()
        np.savez(made, **arrays)
        content = made.getvalue()
        Path("fuzzed.npz").write_bytes(
            content if kind == 2 else hostile.repacked(draw, content, draw.choice(list(arrays)))
        )
    return ["attack", "w4a4.pt", "--replay", "fuzzed.npz", "--device", "cpu"]


def toml(draw: random.Random, folder: Path) -> list[str]:
    keys = ("extends", "epochs", "lr", "milestones", "odgq", "evidence", "fc", "summary", "method", "a.b", '"\\u001b"')
    values = (
        *("1", "-1", "nan", "0x" + "f" * draw.choice((10, 5000)), "9" * draw.choice((20, 5000)), "1e999"),
        *(
            '"natural"',
            '"fuzzed.toml"',
            '"./other.toml"',
            '"a\\u0000.toml"',
            '"\\u001b[31m"',
            "[8]",
            "{a = 1}",
            "[1, []]",
        ),
        *("1979-05-27", "true", '""', "[" * draw.choice((20, 5000)), "{a = " * 40),
    )
    lines = [f"{draw.choice(keys)}{'.a' * draw.choice((0, 0, 50, 5000))} = {draw.choice(values)}" for _ in range(3)]
    text = "\n".join(draw.sample(lines, draw.randrange(1, 4))).encode()
    Path("fuzzed.toml").write_bytes(hostile.damaged(draw, text) if draw.random() < 0.3 else text)
    Path("other.toml").write_text('extends = "fuzzed.toml"')
    if draw.random() < 0.5:
        return ["harden", "float.pt", "--bits", "4", "--bits-per-layer", "fuzzed.toml", *CHEAP]
    return ["train", "--recipe", "fuzzed.toml", "--data", "digits", "--architecture", "resnet8", *CHEAP]


def image_folder(draw: random.Random, folder: Path) -> list[str]:
    data = hostile.image_folder(Path("images"))
    path = data / str(draw.randrange(10)) / f"{draw.randrange(5)}.png"
    whole = path.read_bytes()
    kind = draw.randrange(7)
    if kind < 2:
        path.write_bytes(hostile.damaged(draw, whole) if kind else hostile.EPS)
    elif kind == 2:
        path.write_bytes(hostile.bits_of_one_colour(draw.choice((3_000, 11_000, 20_000))))
    elif kind == 3:
        path.unlink()
        draw.choice(list(hostile.SPECIAL.values()))(path)
    else:
        for _ in range(draw.randrange(1, 4)):
            link = data / str(draw.randrange(10)) / f"link{draw.random()}{draw.choice(('', '.png'))}"
            link.symlink_to(draw.choice((".", "..", "../0", "0.png", "../1/1.png", link.name, "/dev/zero", "/dev/tty")))
    return ["attack", "float.pt", "--data", "images", *ONE, *draw.choice(((), ("--skip-bad-images",)))]


def graph(draw: random.Random, folder: Path) -> list[str]:
    bundle = Path(draw.choice(BUNDLES))
    if draw.random() < 0.5:
        content = hostile.GRAPHS[draw.choice(list(hostile.GRAPHS))]().SerializeToString()
    else:
        (file,) = bundle.glob("*.onnx")
        content = hostile.damaged(draw, file.read_bytes())
    if draw.random() < 0.3:
        Path("fuzzed.onnx").write_bytes(content)
        return ["info", "fuzzed.onnx"]
    hostile.edited_bundle(bundle, Path("fuzzed"), model=content)
    return draw.choice((["info", "fuzzed"], ["attack", "fuzzed", *ONE], ["recheck", "fuzzed", *ONE[2:]]))


def table(draw: random.Random, folder: Path) -> list[str]:
    bundle = Path(draw.choice(BUNDLES))
    record = json.loads((bundle / RECORD).read_text())
    odd: tuple[Any, ...] = (
        None,
        3,
        "x",
        [],
        {},
        [1],
        {"a": 1},
        [[]],
        hostile.ESCAPES,
        [hostile.ESCAPES],
        10**30,
        True,
        float("nan"),
    )
    entries: dict[str, Any] = {draw.choice(list(record)): draw.choice(odd) for _ in range(draw.randrange(1, 3))}
    if draw.random() < 0.6:
        entries.pop("sha256", None)
        hostile.edited_bundle(bundle, Path("fuzzed"), **entries)
        if draw.random() < 0.3:
            text = draw.choice((*DEEP, "9" * 5000, "{}", "[]", "", json.dumps({**record, "sha256": draw.choice(odd)})))
            Path("fuzzed", RECORD).write_text(text)
        return draw.choice((["info", "fuzzed"], ["attack", "fuzzed", *ONE]))
    Path("fuzzed").mkdir()
    for name in ("config.json", "result.json"):
        keys = ("recipe", "spec", "shortfalls", "clean_accuracy", "best_epoch", "command")
        content = {key: draw.choice((*odd, {"name": draw.choice(odd), "method": draw.choice(odd)})) for key in keys}
        Path("fuzzed", name).write_text(draw.choice((*DEEP, *[json.dumps(content)] * 8)))
    return ["info", "fuzzed"]


def own_file(draw: random.Random, folder: Path) -> list[str]:
    """One flipped bit in a file that robustq wrote."""
    if draw.random() < 0.2:
        content = bytearray(Path("own.safetensors").read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        Path("fuzzed.safetensors").write_bytes(content)
        return ["info", "fuzzed.safetensors"]
    shutil.copytree("bundle", "fuzzed")
    (file,) = Path("fuzzed").glob("*.onnx")
    shutil.copy("own.npz", "fuzzed.npz")
    shutil.copy("w4a4.pt", "fuzzed.pt")
    path = draw.choice((file, Path("fuzzed", MODEL), Path("fuzzed", RECORD), Path("fuzzed.npz"), Path("fuzzed.pt")))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    if path.name == "fuzzed.npz":
        return ["attack", "w4a4.pt", "--replay", "fuzzed.npz"]
    return ["info", "fuzzed.pt" if path.name == "fuzzed.pt" else "fuzzed"]
