"""Imports go one way: every module under `robustq`, read as source, imports only from its own line of rooms or below.

Three rules hold, and synthetic trees show that each is enforced: no import upward; no circle, neither of modules nor of
rooms; nothing heavy is loaded while `robustq.cli` is imported. Imports inside functions and under TYPE_CHECKING count
for the first two: they are dependencies all the same. Only the third asks when an import runs.
"""

from __future__ import annotations

import ast
import graphlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "robustq"

# Lowest line first; rooms on one line may import each other. `recipes` holds data files; `api` is robustq/__init__.py.
LINES: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "progress",
        "files",
        "data",
        "recipe",
        "recipes",
    ),
    ("models", "torch_file", "checkpoint"),
    ("attacks",),
    ("evaluation",),
    ("hardening",),
    ("export",),
    ("report",),
    ("workflow",),
    ("api",),
    ("cli",),
)
HEIGHT = {room: height for height, line in enumerate(LINES) for room in line}

# What `robustq --help` must not wait for.
HEAVY = frozenset(
    {
        "PIL",
        "brevitas",
        "matplotlib",
        "numpy",
        "onnx",
        "onnxoptimizer",
        "onnxruntime",
        "pandas",
        "qonnx",
        "scipy",
        "sklearn",
        "torch",
        "torchvision",
    }
)

IMPORTERS = frozenset(["importlib.import_module", "import_module", "__import__"])


@dataclass(frozen=True)
class Import:
    """One imported name: `at_start` says that the import runs while the importing module is being loaded."""

    importer: str
    target: str
    line: int
    at_start: bool


def find_modules(package: Path) -> dict[str, Path]:
    """Map each dotted module name below `package` to its file; symlinked folders are entered, unlike by Path.rglob."""
    modules = {}
    for folder, subfolders, files in os.walk(package, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        prefix = (package.name, *Path(folder).relative_to(package).parts)
        for name in sorted(files):
            if name.endswith(".py"):
                stem = name.removesuffix(".py")
                modules[".".join(prefix if stem == "__init__" else (*prefix, stem))] = Path(folder, name)
    return modules


def room_of(module: str) -> str:
    """Return the room of a dotted name: its second part, and `api` for the package's own __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "api"


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "robustq"


def read_imports(modules: dict[str, Path]) -> list[Import]:
    found: list[Import] = []
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found += _imports_below(tree, module, path.name == "__init__.py", modules, at_start=True)
    return found


def _imports_below(
    node: ast.AST, module: str, is_package: bool, modules: Iterable[str], *, at_start: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        runs = at_start and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            runs = False
        for target in _targets(child, module, is_package, modules):
            yield Import(module, target, getattr(child, "lineno", 0), runs)
        yield from _imports_below(child, module, is_package, modules, at_start=runs)


def _targets(node: ast.AST, module: str, is_package: bool, modules: Iterable[str]) -> list[str]:
    """Return what one syntax node imports: the submodule where `from package import name` names one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = module.split(".")[: None if is_package else -1]
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
        submodules = [f"{base}.{alias.name}" for alias in node.names]
        return sorted({name if name in modules else base for name in submodules})
    if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
        return [str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return []


def find_faults(modules: dict[str, Path]) -> list[str]:
    """Return one line per broken rule; an empty list is a tree in order."""
    imports = read_imports(modules)
    ours = [found for found in imports if is_ours(found.target)]
    faults = [f"{name}: no room is called {room_of(name)!r}" for name in modules if room_of(name) not in HEIGHT]
    for found in ours:
        here, there = room_of(found.importer), room_of(found.target)
        if found.target not in modules:
            faults.append(f"{found.importer}:{found.line} imports {found.target}, which does not exist")
        elif HEIGHT.get(there, -1) > HEIGHT.get(here, -1):
            faults.append(f"{found.importer}:{found.line} imports {found.target}: {here} may not know {there}")
    faults += _circles("modules", ((found.importer, found.target) for found in ours))
    faults += _circles("rooms", ((room_of(found.importer), room_of(found.target)) for found in ours))
    return faults + _heavy_start(modules, imports)


def _circles(what: str, edges: Iterable[tuple[str, str]]) -> list[str]:
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for importer, target in edges:
        if importer != target:
            sorter.add(importer, target)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return [f"circle of {what}: {' <- '.join(error.args[1])}"]
    return []


def _heavy_start(modules: dict[str, Path], imports: list[Import]) -> list[str]:
    """Follow what loading the command line loads; Python runs every package above a module before the module itself."""
    faults = []
    waiting = [(name, name) for name in modules if room_of(name) == "cli"]
    seen = set()
    while waiting:
        module, chain = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if "." in module:
            waiting.append((module.rpartition(".")[0], chain))
        for found in imports:
            if found.importer != module or not found.at_start:
                continue
            if is_ours(found.target):
                waiting.append((found.target, f"{chain} -> {found.target}"))
            elif found.target.split(".")[0] in HEAVY:
                faults.append(f"{module}:{found.line} loads {found.target} when the command line starts ({chain})")
    return faults


def test_imports_go_one_way() -> None:
    assert find_faults(find_modules(PACKAGE)) == []


def test_every_room_was_walked() -> None:
    walked = {room_of(module) for module in find_modules(PACKAGE)}
    assert walked == set(HEIGHT)


def plant(root: Path, files: dict[str, str]) -> dict[str, Path]:
    """Write a synthetic package; `export/` lies beside it and is reached through a symlink, as in the real tree."""
    package = root / "robustq"
    (root / "export").mkdir()
    package.mkdir()
    (package / "export").symlink_to(Path("..", "export"))
    defaults = {"__init__.py": "", "errors.py": "", "cli.py": "", "export/__init__.py": "", "workflow.py": ""}
    for name, source in {**defaults, **files}.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return find_modules(package)


@pytest.mark.parametrize(
    "statement",
    [
        "import robustq.workflow",
        "import robustq.workflow as jobs",
        "from robustq import workflow",
        "from robustq.workflow import quickstart",
        "from .. import workflow",
        "from ..workflow import quickstart",
        "def late():\n    from robustq.workflow import quickstart",
        "class Late:\n    def method(self):\n        import robustq.workflow",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from robustq.workflow import quickstart",
        "try:\n    import robustq.workflow\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('robustq.workflow')",
    ],
)
def test_an_upward_import_is_caught_in_a_symlinked_folder(tmp_path: Path, statement: str) -> None:
    modules = plant(tmp_path, {"export/session.py": statement})
    (fault,) = find_faults(modules)
    assert fault.startswith("robustq.export.session:")
    assert fault.endswith("imports robustq.workflow: export may not know workflow")


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"workflow.py": "import robustq.cli"}, "workflow may not know cli"),
        ({"workflow.py": "from robustq import train_model"}, "workflow may not know api"),
        ({"workflow.py": "import robustq.gone"}, "robustq.gone, which does not exist"),
        ({"utils.py": ""}, "no room is called 'utils'"),
        ({"export/a.py": "from . import b", "export/b.py": "def f():\n    from . import a"}, "circle of modules"),
        ({"export/__init__.py": "from .a import f", "export/a.py": "from . import f"}, "circle of modules"),
        (
            {
                "models/__init__.py": "",
                "models/a.py": "import robustq.checkpoint",
                "models/b.py": "",
                "checkpoint.py": "import robustq.models.b",
            },
            "circle of rooms",
        ),
        ({"cli.py": "import torch.nn"}, "robustq.cli:1 loads torch.nn"),
        ({"cli.py": "from robustq import recipe", "recipe.py": "import numpy as np"}, "robustq.recipe:1 loads numpy"),
        ({"__init__.py": "from sklearn import datasets"}, "robustq:1 loads sklearn"),
        (
            {"cli.py": "import robustq.export.kit", "export/__init__.py": "import onnx", "export/kit.py": ""},
            "loads onnx",
        ),
    ],
)
def test_a_broken_rule_is_caught(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    faults = find_faults(plant(tmp_path, files))
    assert len(faults) == 1
    assert fault in faults[0]


def test_a_tree_in_order_has_no_fault(tmp_path: Path) -> None:
    files = {
        "__init__.py": "def __getattr__(name):\n    from robustq import workflow",
        "cli.py": "from robustq import recipe\ndef harden():\n    import torch\n    import robustq.workflow",
        "recipe.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\nfrom .errors import E",
        "workflow.py": "import torch\nfrom robustq.export import session",
        "export/session.py": "import onnxruntime\nfrom ..errors import E",
    }
    assert find_faults(plant(tmp_path, files)) == []
