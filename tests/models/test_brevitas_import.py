"""Brevitas is imported without torch's compiler, leaves torch as it was, and finds the compiler when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIRST = """
import sys, torch
import robustq.models
import brevitas
print("brevitas" in sys.modules, "torch._dynamo" in sys.modules, "_dynamo" in vars(torch))
print(brevitas.is_dynamo_compiling(), torch._dynamo is sys.modules["torch._dynamo"], torch._dynamo.__spec__.name)
print(robustq.models._LazyDynamo().disable is torch._dynamo.disable)

@torch.compile(backend="eager", fullgraph=True)
def twice(x):
    return 2 * x if brevitas.is_dynamo_compiling() else x

print(twice(torch.ones(1)).item())
"""

LOADED_BEFORE = """
import torch._dynamo
real = torch._dynamo
import robustq.models, brevitas
print(torch._dynamo is real, brevitas.is_dynamo_compiling is real.is_compiling)
"""


def output(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_the_first_import() -> None:
    assert output(FIRST) == ["True", "False", "False", "False", "True", "torch._dynamo", "True", "2.0"]


@pytest.mark.slow
def test_a_compiler_that_is_loaded_already_is_used() -> None:
    assert output(LOADED_BEFORE) == ["True", "True"]
