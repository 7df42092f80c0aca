"""The wheel: built from a copy of the tree, complete, free of generic names, and usable away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ZOO = (".json", ".npz", ".onnx", ".pt")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "robustq", "export", "recipes")


def packaged_files() -> set[str]:
    """Return the paths in the wheel that the tree under robustq asks for, symlinked folders included."""
    return {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "robustq", followlinks=True)
        for name in names
        if name.endswith((".py", ".toml", ".j2", ".mjs", *ZOO)) or name == "py.typed"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy: setuptools leaves build/ and an egg-info beside what it builds."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    # The venv's own setuptools builds it: no isolated environment, so nothing to download.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel, which is all that installing a pure one does; a venv that uv made has no pip to do it."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {Path(name).parent for name in packaged_files() if name.endswith(".py")}
    assert sorted(settings["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    without_init = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert without_init == []


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert names == packaged_files()
    assert {name.split("/")[0] for name in names} == {"robustq"}, "a generic name such as `export` would be taken"


def test_wheel_runs_the_command_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    """Far from the repository, with the unpacked wheel before the editable install on the path."""
    (info,) = installed.glob("*.dist-info")
    assert "robustq = robustq.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    code = "import sys, robustq.export, robustq.recipes; print(robustq.export.__file__, robustq.recipes.__file__)\n"
    code += "sys.argv[1:] = ['--version']; from robustq.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package = installed / "robustq"
    found, *told = done.stdout.splitlines()
    assert found.split() == [str(package / part) for part in ("export/__init__.py", "recipes/__init__.py")]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert version in "".join(told)
