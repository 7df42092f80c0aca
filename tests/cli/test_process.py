"""What the program asks of its process: seen in a process of its own, where it does not last."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from robustq.cli.process import keep_freed_memory
kept = keep_freed_memory()
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(4 * 1024 * 1024, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(10)
print(kept, rounds(50))
"""

WISHES = """
import os
from robustq.cli.process import prepare
prepare()
names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"
print(*(os.environ.get(name, "unset") for name in names))
"""


def answer(code: str, **environment: str) -> list[str]:
    base = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**base, **environment}
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = answer(FAULTS)
    told_otherwise, as_told = answer(FAULTS, MALLOC_TRIM_THRESHOLD_="0")
    assert (kept, told_otherwise) == ("True", "False")
    # 50 blocks of 4 MB are 51,200 pages; trimmed at each turn, all of them are taken anew.
    assert int(faults) < 1000 < 40_000 < int(as_told)


def test_what_the_environment_says_stands() -> None:
    assert answer(WISHES) == ["PASSIVE", "2000", "0"]
    # GOMP_SPINCOUNT would overrule a policy that the user has set.
    assert answer(WISHES, OMP_WAIT_POLICY="ACTIVE", THP_MEM_ALLOC_ENABLE="1") == ["ACTIVE", "unset", "1"]
    assert answer(WISHES, GOMP_SPINCOUNT="7") == ["unset", "7", "0"]
