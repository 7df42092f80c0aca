"""The docs: the tree of architecture.md is complete, links, files and benchmarks exist, lines have 120 characters."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def files_in_the_tree(page: str) -> set[str]:
    """Return the files of the indented list in a ```text block; a line is two spaces a level, a name, a description."""
    (block,) = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found, folders = set(), list[str]()
    for line in block.splitlines():
        entry = re.fullmatch(r"((?:  )*)(\S+)  +\S.*", line)
        assert entry is not None, f"no name and description: {line!r}"
        folders[len(entry[1]) // 2 :] = [entry[2]]
        if not entry[2].endswith("/"):
            assert "".join(folders) not in found, f"twice: {line!r}"
            found.add("".join(folders))
    return found


def test_the_tree_of_the_architecture_page_is_the_tree() -> None:
    named = files_in_the_tree((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    there = {
        Path(folder, name).relative_to(ROOT).as_posix()
        for room in ("robustq", "export")
        for folder, _, names in os.walk(ROOT / room)
        for name in names
        if name.endswith(".py")
    }
    assert sorted(named - there) == [], "docs/architecture.md names files that do not exist"
    described = {name for name in there if not name.endswith("/__init__.py")}
    assert sorted(described - named) == [], "docs/architecture.md lacks a line for files"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist_and_prose_fits(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"
    modules = [f"benchmarks/{name}.py" for name in re.findall(r"python -m benchmarks\.(\w+)", text)]
    files = modules + re.findall(r"\b(?:tests|benchmarks|export|robustq)/[\w/]+\.\w+\b", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    # The row of a table cannot be broken.
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
