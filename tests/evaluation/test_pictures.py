"""The file of adversarial images: what is written is read, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustq.errors import UsageError
from robustq.evaluation.adversarial_images import AdversarialImages, check_ball, digest


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures(clean: torch.Tensor) -> AdversarialImages:
    labels = torch.arange(5)
    x_adv = (clean.int() + 8).clamp(max=255).to(torch.uint8)
    found_by = ("clean", "apgd-ce", "none", "square", "apgd-ce")
    broken = torch.tensor([True, True, False, True, True])
    about = {"model": "m.pt", "seed": 0}
    places = torch.tensor([0, 2, 4, 6, 9])
    return AdversarialImages(x_adv, labels, places, found_by, broken, 8 / 255, "digits", digest(clean, labels), about)


def test_what_is_saved_is_loaded(pictures: AdversarialImages, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.npz"
    pictures.save(path)
    again = AdversarialImages.load(path)
    for name in ("x_adv", "labels", "places", "broken"):
        assert torch.equal(getattr(again, name), getattr(pictures, name)), name
        assert getattr(again, name).dtype == getattr(pictures, name).dtype
    for name in ("attack", "epsilon", "data", "clean_sha256", "about"):
        assert getattr(again, name) == getattr(pictures, name), name


def test_images_of_few_changes_take_few_bytes(clean: torch.Tensor, pictures: AdversarialImages, tmp_path: Path) -> None:
    many = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    column = torch.zeros(1000, dtype=torch.int64)
    large = replace(
        pictures, x_adv=many, labels=column, places=column, attack=("apgd-ce",) * 1000, broken=column.bool()
    )
    large.save(tmp_path / "found.npz")
    assert (tmp_path / "found.npz").stat().st_size < many.numel() / 50


def test_digest_follows_every_pixel_and_label(clean: torch.Tensor) -> None:
    labels = torch.arange(5)
    other = clean.clone()
    other[4, 0, 3, 3] ^= 1
    assert len({digest(clean, labels), digest(other, labels), digest(clean, labels.flip(0))}) == 3
    assert digest(clean, labels) == digest(clean.clone(), labels.int())


def test_a_picture_outside_the_ball_is_named(clean: torch.Tensor, pictures: AdversarialImages) -> None:
    check_ball(pictures, clean)
    moved = pictures.x_adv.clone()
    moved[3, 0, 1, 1] = clean[3, 0, 1, 1] - 9 if clean[3, 0, 1, 1] > 100 else clean[3, 0, 1, 1] + 9
    with pytest.raises(UsageError, match="1 pictures leave the ball: that of test image 6 by 9 levels, 8 are allowed"):
        check_ball(replace(pictures, x_adv=moved), clean)
    with pytest.raises(UsageError, match="shape"):
        check_ball(pictures, clean[:4])


def rewritten(path: Path, **changed: Any) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, value in changed.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x_adv": None}, "lacks"),
        ({"broken": None}, "lacks"),
        ({"x_adv": np.zeros((5, 1, 4, 4), np.float32)}, "x_adv is float32"),
        ({"x_adv": np.zeros((4, 1, 4, 4), np.uint8)}, "do not fit together"),
        ({"x_adv": np.zeros((0, 1, 4, 4), np.uint8)}, "do not fit together"),
        ({"labels": np.zeros((5, 2), np.int64)}, "do not fit together"),
        ({"epsilon": np.float64(8)}, "do not fit together"),
        ({"epsilon": np.float64("nan")}, "do not fit together"),
        ({"about": np.str_("{")}, "cannot be read"),
        ({"about": np.str_("[]")}, "do not fit together"),
        ({"attack": np.array([None] * 5, dtype=object)}, "cannot be read"),
    ],
)
def test_another_file_is_refused(
    pictures: AdversarialImages, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    path = tmp_path / "found.npz"
    pictures.save(path)
    rewritten(path, **changed)
    with pytest.raises(UsageError, match=told):
        AdversarialImages.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x93NUMPY nonsense", b"text"])
def test_damage_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "found.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read") as told:
        AdversarialImages.load(path)
    assert "\n" not in str(told.value)


def test_truncation_and_absence_are_one_line(pictures: AdversarialImages, tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    pictures.save(path)
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"cannot be read|lacks"):
            AdversarialImages.load(path)
    with pytest.raises(UsageError, match="no such file"):
        AdversarialImages.load(tmp_path / "none.npz")
