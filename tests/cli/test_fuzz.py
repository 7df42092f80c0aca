"""500 calls with random command lines, damaged model files and damaged .npz files, all drawn from one seed a case.

Whatever comes in: no traceback, exit 0, 1 or 2, and after a refusal one last line that begins with "robustq: ", nothing
on stdout and nothing written.
"""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.conftest import Outcome, Run

CASES = {"command line": 200, "model file": 150, "npz": 150}

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
ARGUMENTS = {"train": (), "recipes": ("odgq", "natural"), "nothing": ()}


def command_line(draw: random.Random, folder: Path) -> list[str]:
    command = draw.choice(list(OPTIONS))
    words = [command, *(("--suite", "recheck", "--no-surrogates") if command == "attack" else ())]
    usual: tuple[str, ...] = ARGUMENTS.get(command, ("w4a4.pt", "float.pt"))
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


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """Flipped, cut, doubled, zeroed or overwritten."""
    content = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 5, 50))):
        place, length = draw.randrange(len(content)), draw.randrange(1, 200)
        kind = draw.randrange(6)
        if kind == 0:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        elif kind == 3:
            content[place : place + length] = bytes(length)
        elif kind == 4:
            content[place : place + length] = draw.randbytes(length)
        else:
            del content[max(place, 1) :]
        if not content:
            break
    return bytes(content)


def repacked(draw: random.Random, whole: bytes, record: str) -> bytes:
    """The archive with one record damaged and every checksum right: so what is damaged is the content's grammar."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(made, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            after.writestr(entry.filename, damaged(draw, content) if entry.filename.endswith(record) else content)
    return made.getvalue()


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
        Path("fuzzed.pt").write_bytes(damaged(draw, whole))
    elif kind == 1:
        Path("fuzzed.pt").write_bytes(repacked(draw, whole, "data.pkl"))
    else:
        torch.save(changed(draw, torch.load(io.BytesIO(whole), weights_only=True)), "fuzzed.pt")
    return draw.choice(
        (
            ["info", "fuzzed.pt"],
            ["attack", "fuzzed.pt", "--images", "1", "--epsilon", "0"],
            ["harden", "fuzzed.pt", "--bits", "8", "--data", "digits", *CHEAP],
            ["export", "fuzzed.pt", "--images", "1", "--no-recheck"],
        )
        if draw.random() < 0.3
        else (["info", "fuzzed.pt"], ["attack", "fuzzed.pt", "--images", "1", "--epsilon", "0"])
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
        whole = damaged(draw, whole)
    if kind == 1:
        whole = repacked(draw, whole, draw.choice(("x_train.npy", "y_train.npy", "y_test.npy")))
    Path("fuzzed.npz").write_bytes(whole)
    return ["attack", "w4a4.pt", "--data", "fuzzed.npz", "--images", "1", "--epsilon", "0"]


def check(outcome: Outcome, before: set[Path]) -> None:
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code in (0, 1, 2), outcome.err
    if outcome.code:
        lines = outcome.err.strip().splitlines()
        assert lines[-1].startswith("robustq: "), outcome.err
    if outcome.code == 2:
        assert outcome.out == ""
        assert set(Path.cwd().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("part", range(5))
def test_whatever_comes_in(
    run: Run, digits_float: Path, digits_w4a4: Path, what: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A word of the command line may be "~": what it finds there must not depend on whose machine this is.
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("ROBUSTQ_DATA", str(Path.cwd() / "no-data"))
    make = {"command line": command_line, "model file": model_file, "npz": npz}[what]
    shutil.copy(digits_float, "float.pt")
    shutil.copy(digits_w4a4, "w4a4.pt")
    Path("text.pt").write_text("text")
    Path("folder").mkdir()
    exits: dict[int, int] = {}
    for case in range(CASES[what] // 5):
        draw = random.Random(f"{what} {part} {case}")
        words = make(draw, Path.cwd())
        before = set(Path.cwd().rglob("*"))
        try:
            outcome = run(*words)
            check(outcome, before)
        except BaseException:
            print(f"case {case}: {words!r}"[:2000])
            raise
        exits[outcome.code] = exits.get(outcome.code, 0) + 1
    assert exits[2] > CASES[what] // 5 * 0.3, exits  # else this would test little
    assert what != "command line" or exits[0] >= 2, exits
