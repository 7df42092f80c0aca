"""What the command line asks of its own process, before the heavy libraries are loaded: threads and memory.

A library may not decide this for the program that imports it, so that ``import robustq`` leaves both alone.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""

_LARGEST_THRESHOLD = 32 * 1024 * 1024
"""glibc refuses more on machines of 64 bits."""

_NEVER = 2**31 - 1


_SPINS = 2000
"""Turns of its waiting loop that a thread of libgomp takes before it sleeps, about 20 microseconds (its source reckons
with 100 turns a microsecond): `python -m benchmarks.waiting_threads`, docs/results/training-cost.md.
"""


def prepare() -> None:
    """Let threads spin a moment before they sleep, and let freed memory be used again, unless the environment says
    otherwise.
    """
    # Threads that sleep at once have to be woken for each of a step's thousand operations; threads that spin for long
    # take the core from whatever else wants it, and a step then takes four times as long.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # to other OpenMP libraries than libgomp
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
    # Torch then asks for pages of 2 MB where a tensor has room for them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Ask glibc not to give freed memory back to the system: a training step frees and takes the same gigabyte each
    time, and taking it anew costs a page fault for every 4 KB of it (docs/results/training-cost.md).

    Returns:
        Whether it was done: not without glibc, nor where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ say how.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
