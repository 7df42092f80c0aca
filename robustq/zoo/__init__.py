"""The zoo: networks that come with robustq, each with its card and, if it was attacked, its adversarial images.

``zoo:NAME`` stands for the network's file wherever a model is taken, and for its images after ``--replay``. The files
beside this module are NAME.json (the card) with NAME.pt (robustq's model file, weights in float16) or NAME.onnx (the
deployed file), and NAME.npz. ``python -m benchmarks.zoo_entry`` writes them.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustq.errors import ModelFileError, UsageError
from robustq.seals import sha256

PREFIX = "zoo:"

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo."""

    name: str
    model: Path  # .pt or .onnx
    images: Path | None  # .npz of adversarial images
    card: dict[str, Any]


def entries() -> list[ZooEntry]:
    """All networks, by name."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        images = path.with_suffix(".npz")
        model = path.with_suffix(Path(card["file"]).suffix)
        found.append(ZooEntry(path.stem, model, images if "images_sha256" in card else None, card))
    return found


def find(name: str) -> ZooEntry:
    """The network ``name``, without the prefix.

    Raises:
        UsageError: there is none.
        ModelFileError: a file differs from its card.
    """
    known = {entry.name: entry for entry in entries()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UsageError(f"{PREFIX}{name} is not in the zoo; nearest: {PREFIX}{near[0]} (list: robustq zoo)")
    entry = known[name]
    for path, key in ((entry.model, "sha256"), (entry.images, "images_sha256")):
        if path is not None and (not path.is_file() or sha256(path) != entry.card[key]):
            raise ModelFileError(f"{path}: is missing or not the file of its card; install robustq again")
    return entry


def model_path(given: Path | str) -> Path:
    """The file that ``zoo:NAME`` names; any other path as it is. Errors as :func:`find`."""
    text = str(given)
    return find(text.removeprefix(PREFIX)).model if text.startswith(PREFIX) else Path(given)


def images_path(given: Path | str) -> Path:
    """The adversarial images that ``zoo:NAME`` names; any other path as it is.

    Raises:
        UsageError: that network has none.
        UsageError, ModelFileError: as :func:`find`.
    """
    text = str(given)
    if not text.startswith(PREFIX):
        return Path(given)
    images = find(text.removeprefix(PREFIX)).images
    if images is None:
        raise UsageError(f"{text} has no adversarial images; the others are listed by: robustq zoo")
    return images
