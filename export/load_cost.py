"""Seconds and bytes of loading one file, measured in a process of its own: see :mod:`robustq.export.timing`.

Run it as ``python -m robustq.export.load_cost FILE.onnx THREADS C H W`` (or H W C).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import psutil

from robustq.errors import ModelFileError
from robustq.export.timing import Subject, one_call, open_timed

LOADS = 3
"""Times that the file is opened; the median counts."""


def main() -> None:
    """Print [seconds, bytes] as JSON. Bytes are the growth of this process by the first session and its images."""
    path, threads, first, second, third = sys.argv[1:]
    subject = Subject(Path(path), (int(first), int(second), int(third)))
    process, loads, grown = psutil.Process(), [], 0
    before = process.memory_info().rss
    for number in range(LOADS):
        begin = time.perf_counter()
        session = open_timed(subject.path, int(threads))
        loads.append(time.perf_counter() - begin)
        if number == 0:
            call = one_call(session, subject, 1)
            for _ in range(3):
                call()
            grown = process.memory_info().rss - before
    print(json.dumps([statistics.median(loads), max(grown, 0)]))


if __name__ == "__main__":
    try:
        main()
    except ModelFileError as error:
        sys.exit(str(error))
