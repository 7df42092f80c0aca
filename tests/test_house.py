"""No file of the tree names a package registry or a path of the machine that it was written on."""

from __future__ import annotations

import os
import re
import shutil
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

# What .gitignore lists, for a tree that is no checkout.
IGNORED = re.compile(r"\.venv|__pycache__|build|dist|runs|export-out|\..*_cache|\.hypothesis|\.git|.*\.egg-info")


def files_of(root: Path) -> list[Path]:
    """Return the regular files that are tracked or could be (as git sees it); without git, all but the ignored ones."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            paths = [root / name for name in listing.stdout.split("\0") if name]
            return [path for path in paths if path.is_file() and not path.is_symlink()]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not IGNORED.fullmatch(name)]
        found += [Path(folder, name) for name in names]
    return [path for path in found if path.is_file() and not path.is_symlink()]


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


def test_no_file_names_a_registry_or_this_machine() -> None:
    paths = files_of(ROOT)
    assert {"pyproject.toml", "requirements.txt", "Makefile"} <= {path.name for path in paths}
    assert findings(paths) == []


@pytest.mark.parametrize("git", [False, True])
def test_both_ways_to_list_find_the_same(tmp_path: Path, git: bool) -> None:
    for name in ("a.py", "b/c.md", ".venv/x.py", "runs/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text", encoding="utf-8")
    shutil.copy(ROOT / ".gitignore", tmp_path / ".gitignore")
    if git:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path)) == [
        ".gitignore",
        "a.py",
        "b/c.md",
    ]


@pytest.mark.parametrize(
    "line",
    [*(f"see https://{host}/simple" for host in HOSTS), *(f'path = "/{home}/me/x.pt"' for home in HOMES[:4])],
)
def test_a_forbidden_word_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "page.md").write_text(f"first\n{line}\n", encoding="utf-8")
    (found,) = findings([tmp_path / "page.md"])
    assert found.startswith(f"{tmp_path / 'page.md'}:2: ")


@pytest.mark.parametrize(
    "line", ["https://github.com/org/" + "wo" + "rk/x", "a relative ho" + "me/x", "runs/wo" + "rk/best.pt"]
)
def test_a_harmless_word_is_not(tmp_path: Path, line: str) -> None:
    (tmp_path / "page.md").write_text(line, encoding="utf-8")
    assert findings([tmp_path / "page.md"]) == []
