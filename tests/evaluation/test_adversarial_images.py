"""The file of adversarial images: what is written is read, and other files are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustq.errors import UsageError
from robustq.evaluation.adversarial_images import AdversarialImages, check_ball, digest

CLEAN = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FOUND = AdversarialImages(
    x_adv=(CLEAN.int() + 8).clamp(max=255).to(torch.uint8),
    labels=torch.arange(5),
    indices=torch.tensor([0, 2, 4, 6, 9]),
    attack=("clean", "apgd-ce", "none", "square", "apgd-ce"),
    broken=torch.tensor([True, True, False, True, True]),
    epsilon=8 / 255,
    data="digits",
    clean_sha256=digest(CLEAN, torch.arange(5)),
    about={"model": "m.pt", "seed": 0},
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.npz"
    FOUND.save(path)
    again = AdversarialImages.load(path)
    for name in ("x_adv", "labels", "indices", "broken"):
        assert torch.equal(getattr(again, name), getattr(FOUND, name)), name
        assert getattr(again, name).dtype == getattr(FOUND, name).dtype
    for name in ("attack", "epsilon", "data", "clean_sha256", "about"):
        assert getattr(again, name) == getattr(FOUND, name), name
    with np.load(path) as archive:  # the names that files of earlier versions have
        names = {"x_adv", "labels", "places", "attack", "broken", "epsilon", "data", "clean_sha256", "about"}
        assert set(archive.files) == names


def test_digest_follows_every_pixel_and_label() -> None:
    labels = torch.arange(5)
    other = CLEAN.clone()
    other[4, 0, 3, 3] ^= 1
    assert len({digest(CLEAN, labels), digest(other, labels), digest(CLEAN, labels.flip(0))}) == 3
    assert digest(CLEAN, labels) == digest(CLEAN.clone(), labels.int())


def test_an_image_outside_the_ball_is_named() -> None:
    check_ball(FOUND, CLEAN)
    moved = FOUND.x_adv.clone()
    moved[3, 0, 1, 1] = CLEAN[3, 0, 1, 1] - 9 if CLEAN[3, 0, 1, 1] > 100 else CLEAN[3, 0, 1, 1] + 9
    with pytest.raises(UsageError, match="1 images leave the ball: that of test image 6 by 9 levels, 8 are allowed"):
        check_ball(replace(FOUND, x_adv=moved), CLEAN)
    with pytest.raises(UsageError, match="shape"):
        check_ball(FOUND, CLEAN[:4])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"broken": None}, "lacks"),
        ({"x_adv": np.zeros((5, 1, 4, 4), np.float32)}, "x_adv is float32"),
        ({"epsilon": np.float64("nan")}, "do not fit together"),
        ({"about": np.str_("{")}, "cannot be read"),
        ({"attack": np.array([None] * 5, dtype=object)}, "cannot be read"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "found.npz"
    FOUND.save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changed
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(UsageError, match=message):
        AdversarialImages.load(path)


def test_damage_and_absence_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    FOUND.save(path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 broken", b"\x93NUMPY nonsense", b"text", whole[:10], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot be read|lacks|is damaged") as raised:
            AdversarialImages.load(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="no such file"):
        AdversarialImages.load(tmp_path / "none.npz")
