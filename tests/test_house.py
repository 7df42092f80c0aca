"""No file of the tree names a package registry or a path of the machine that it was written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Written in halves, so that this file does not find itself.
HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "anaconda" + ".org", "np" + "mjs.")
HOMES = ("ro" + "ot", "ho" + "me", "wo" + "rk", "Us" + "ers", "op" + "t/py" + "pi")
FORBIDDEN = re.compile(
    "|".join([*map(re.escape, HOSTS), rf"(?<![\w.~$}}/-])/(?:{'|'.join(HOMES)})(?:/|\b(?=['\"\s]))"])
)


def files_of(root: Path) -> list[Path]:
    """Return the regular files that git tracks or would add."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = [root / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def findings(paths: list[Path]) -> list[str]:
    """Return `file:line: match` for each forbidden word; files that are not UTF-8 text are passed over."""
    found = []
    for path in paths:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        for match in FORBIDDEN.finditer(text):
            found.append(f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tree is no git checkout")
def test_no_file_names_a_registry_or_this_machine() -> None:
    paths = files_of(ROOT)
    assert {"pyproject.toml", "requirements.txt", "Makefile"} <= {path.name for path in paths}
    assert findings(paths) == []


@pytest.mark.parametrize(
    "line",
    [*(f"see https://{host}/simple" for host in HOSTS), *(f'path = "/{home}/me/x.pt"' for home in HOMES[:4])],
)
def test_a_forbidden_word_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "page.md").write_text(f"first\n{line}\n", encoding="utf-8")
    (found,) = findings([tmp_path / "page.md"])
    assert found.startswith(f"{tmp_path / 'page.md'}:2: ")
