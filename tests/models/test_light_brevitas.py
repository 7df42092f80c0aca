"""Brevitas imported without torch's compiler: torch is left as it was, and the compiler is found when it is used."""

from __future__ import annotations

import subprocess
import sys

LEFT_ALONE = """
import sys, torch
import robustq.models
print("brevitas" in sys.modules, "torch._dynamo" in sys.modules, "_dynamo" in vars(torch))
print(torch._dynamo is sys.modules["torch._dynamo"], torch._dynamo.__spec__.name)
"""

COMPILING = """
import torch
import robustq.models
import brevitas
@torch.compile(backend="eager", fullgraph=True)
def twice(x):
    return 2 * x if brevitas.is_dynamo_compiling() else x
print(brevitas.is_dynamo_compiling(), twice(torch.ones(1)).item())
"""

ANYTHING_ELSE = """
import sys, torch
from robustq.models.light_brevitas import _Compiler
print(_Compiler().disable is torch._dynamo.disable)
"""

LOADED_BEFORE = """
import torch._dynamo
real = torch._dynamo
import robustq.models, brevitas
print(torch._dynamo is real, brevitas.is_dynamo_compiling is real.is_compiling)
"""


def answer(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_torch_is_left_as_it_was() -> None:
    assert answer(LEFT_ALONE) == ["True", "False", "False", "True", "torch._dynamo"]


def test_brevitas_still_learns_that_it_is_compiled() -> None:
    assert answer(COMPILING) == ["False", "2.0"]


def test_whatever_else_is_asked_for_is_the_real_one() -> None:
    assert answer(ANYTHING_ELSE) == ["True"]


def test_a_compiler_that_is_there_already_is_used() -> None:
    assert answer(LOADED_BEFORE) == ["True", "True"]
