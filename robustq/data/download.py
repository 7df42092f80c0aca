"""The sets that torchvision downloads: fetched aside and moved into place when whole, with a bar of our own."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustq.errors import DataError
from robustq.progress import Bar, bar, note

# name -> torchvision.datasets' class
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def load_torchvision_parts(name: str, root: Path) -> list[Any]:
    """Torchvision's training and test part of the set called `name`, downloaded below `root` on first use.

    Raises:
        DataError: it is not there and cannot be downloaded.
    """
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    try:
        # stdout is for the result (--json), and what a download has to say is said here.
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return [kind(root=str(root), train=train, download=False) for train in (True, False)]
            except RuntimeError:  # torchvision's word for: not found, or not whole
                return _download(kind, name, root)
    except Exception as error:  # URL, socket, archive and checksum errors share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} could neither be read from {root} nor downloaded to it ({reason}); pass --data FILE.npz "
            "or --data FOLDER (of images) instead"
        ) from error


def _download(kind: Any, name: str, root: Path) -> list[Any]:
    note(f"data    downloading {name} to {root}")
    root.mkdir(parents=True, exist_ok=True)
    # Aside, so that whatever stops it leaves no half archive behind under a name that counts.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        with _own_bar(name):
            parts = [kind(root=folder, train=train, download=True) for train in (True, False)]
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                target = root / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    return parts


@contextlib.contextmanager
def _own_bar(name: str) -> Iterator[None]:
    """Torchvision draws a tqdm bar, asked for or not, on a terminal or not; put ours in its place meanwhile."""
    from torchvision.datasets import utils

    theirs = getattr(utils, "tqdm", None)

    class Drawn:
        """As much of tqdm as torchvision uses; in kB."""

        def __init__(self, total: int | None = None, **_: Any) -> None:
            self._stack = contextlib.ExitStack()
            self._total = (total or 0) / 1000
            self._bar: Bar | None = None

        def __enter__(self) -> Drawn:
            self._bar = self._stack.enter_context(bar(f"download {name}", self._total, "kB"))
            return self

        def update(self, count: int) -> None:
            if self._bar is not None:
                self._bar.advance(count / 1000)

        def __exit__(self, *_: object) -> None:
            self._stack.close()

    if theirs is None:
        yield
        return
    utils.tqdm = Drawn
    try:
        yield
    finally:
        utils.tqdm = theirs
