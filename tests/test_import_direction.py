"""Imports go one way: the contracts of import-linter in pyproject.toml hold, and a planted violation breaks each.

Two rules are no contracts and are checked here: no circle between single modules, packages' `__init__` included, and
nothing heavy is loaded while `robustq.cli` is imported.
"""

from __future__ import annotations

import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    *("PIL", "brevitas", "matplotlib", "numpy", "onnx", "onnxoptimizer", "onnxruntime", "pandas", "qonnx", "scipy"),
    *("sklearn", "sympy", "torch", "torchvision"),
)

LAYERS = "Imports go down"
SIBLINGS = "No circles between sibling modules or packages"
API = "Only the command line imports the public API"
COMMAND_LINE = "The public API does not import the command line"


def lint(folder: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_contracts_hold() -> None:
    status, output = lint(ROOT)
    assert status == 0, output


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, in which `robustq/export` and `robustq/recipes` are symlinks as in the checkout."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("robustq", "export", "recipes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize(
    ("planted", "broken"),
    [
        ({"robustq/workflow/planted.py": "import robustq.cli"}, LAYERS),
        ({"export/lowering/planted.py": "from ...workflow import quickstart"}, LAYERS),
        ({"export/planted.py": "def late():\n    from robustq.workflow import quickstart"}, LAYERS),
        (
            {"export/planted.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import robustq.workflow"},
            LAYERS,
        ),
        ({"robustq/utils.py": ""}, LAYERS),
        ({"export/a.py": "from robustq.export import b", "export/b.py": "def f():\n    from . import a"}, SIBLINGS),
        ({"robustq/errors.py": "import robustq.files"}, SIBLINGS),
        ({"robustq/workflow/planted.py": "from robustq import train_model"}, API),
        ({"robustq/__init__.py": "import robustq.cli.program"}, COMMAND_LINE),
    ],
)
def test_a_planted_violation_breaks_its_contract(tree: Path, planted: dict[str, str], broken: str) -> None:
    before = {name: (tree / name).read_bytes() if (tree / name).exists() else None for name in planted}
    for name, source in planted.items():
        (tree / name).write_bytes((before[name] or b"") + f"\n{source}\n".encode())
    status, output = lint(tree)
    for name, content in before.items():
        (tree / name).unlink() if content is None else (tree / name).write_bytes(content)
    assert status == 1
    assert f"{broken} BROKEN" in output


def circle(package: str) -> list[str]:
    """Return the modules of one circle of imports; an empty list where there is none."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_through_others() -> None:
    assert circle("robustq") == []


def test_a_circle_through_an_init_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "planted_circle"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import f", encoding="utf-8")
    (package / "a.py").write_text("def f():\n    from . import g", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(circle("planted_circle")) == {"planted_circle", "planted_circle.a"}


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    names = sorted(name for name in grimp.build_graph("robustq", cache_dir=None).modules if ".cli" in name)
    assert "robustq.cli.train" in names
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= set(loaded)
    assert set(loaded) & set(HEAVY) == set()
