"""The requirements files fit pyproject.toml. (pip refuses lines without a hash, test_house.py the names of hosts.)"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-reference.txt")
LINES = {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in FILES}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pinned(name: str) -> dict[str, list[str]]:
    """Return canonical name -> versions; more than one where the newest depends on the version of Python."""
    pins: dict[str, list[str]] = {}
    for line in LINES[name]:
        if found := re.match(r"([A-Za-z0-9][\w.-]*)==([\w.!+-]+) ", line):
            pins.setdefault(canonicalize_name(found[1]), []).append(found[2])
    return pins


def test_pins_satisfy_pyproject() -> None:
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"] + PYPROJECT["build-system"]["requires"]
    pins = pinned("requirements.txt")
    for text in wanted:
        need = Requirement(text)
        versions = pins.get(canonicalize_name(need.name), [])
        assert versions, f"{text} of pyproject.toml has no pin: make pins"
        assert all(need.specifier.contains(version) for version in versions), f"{text} is pinned to {versions}"


def test_reference_packages_are_pinned_beside_and_installed() -> None:
    wanted = [Requirement(text) for text in PYPROJECT["dependency-groups"]["reference"]]
    pins = pinned("requirements-reference.txt")
    assert {canonicalize_name(need.name) for need in wanted} == set(pins)
    for need in wanted:
        (version,) = pins[canonicalize_name(need.name)]
        assert need.specifier.contains(version)
        # Without them the comparisons of tests/attacks would not run; `make setup` installs them.
        assert metadata.version(need.name) == version
    assert not set(pins) & set(pinned("requirements.txt"))
