"""Seconds and bytes of loading one file, measured in a process of its own: see :mod:`robustq.export.timing`.

Run it as ``python -m robustq.export.load_cost FILE.onnx THREADS C H W RUNTIME`` (or H W C).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import psutil

from robustq.errors import RobustqError
from robustq.export.timing import Subject, one_call, opened

LOADS = 3
"""Times that the file is opened; the median counts."""


def main() -> None:
    """Print [seconds, bytes] as JSON: bytes by which the first session and its images let this process grow."""
    path, threads, first, second, third, runtime = sys.argv[1:]
    subject = Subject(Path(path), (int(first), int(second), int(third)), runtime=runtime)
    process, loads, grown = psutil.Process(), [], 0
    before = _resident(process)
    for number in range(LOADS):
        begin = time.perf_counter()
        session = opened(subject, int(threads))
        loads.append(time.perf_counter() - begin)
        if number == 0:
            call = one_call(session, subject, 1)
            for _ in range(3):
                call()
            grown = _resident(process) - before
    print(json.dumps([statistics.median(loads), max(grown, 0)]))


def _resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and its children, such as Node.js."""
    family = [process, *process.children(recursive=True)]
    return sum(int(one.memory_info().rss) for one in family)


if __name__ == "__main__":
    try:
        main()
    except RobustqError as error:
        sys.exit(str(error))
