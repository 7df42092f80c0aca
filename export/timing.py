"""What .onnx files cost in a runtime on this machine: latency, throughput, load time, memory."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustq.errors import ModelFileError
from robustq.export.runtimes.registry import ONNXRUNTIME, open_model
from robustq.export.session import open_session, session_options
from robustq.progress import note

TURN = 0.05
"""Seconds that a file runs before the next one has its turn: a busy second of the machine meets all files."""

LONGEST_LOAD = 600.0
"""Seconds for one file."""


@dataclass(frozen=True)
class Timing:
    """The cost of a file.

    Args:
        median_ms, p99_ms: milliseconds for one image: the median, and what 99 of 100 calls do not exceed.
        calls: calls that were timed.
        images_per_second: in batches of ``batch`` images.
        batch: 1 where the file takes single images only.
        load_ms: milliseconds to open the file, which the system holds in memory already; median.
        memory_bytes: growth of the process by the opened file and its first images.
        size_bytes: of the file.
    """

    median_ms: float
    p99_ms: float
    calls: int
    images_per_second: float
    batch: int
    load_ms: float
    memory_bytes: int
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A file to be timed, with the shape (C, H, W) or (H, W, C) of its images."""

    path: Path
    shape: tuple[int, int, int]
    single: bool = False  # takes one image at a time
    runtime: str = ONNXRUNTIME  # a name of robustq.export.runtimes.registry.RUNTIMES


def time_files(subjects: Sequence[Subject], *, threads: int = 1, seconds: float = 3.0, batch: int = 64) -> list[Timing]:
    """Time files against each other: they take turns, so that a load on the machine meets all of them.

    Args:
        threads: of the runtime, within one operator.
        seconds: for which each file runs, once with single images and once in batches.
        batch: images of a batch.

    Raises:
        ModelFileError: the runtime cannot load or run a file.
        UsageError: a runtime that is not installed, or does not run on so many threads.
    """
    loads = []
    for subject in subjects:
        note(f"load    {subject.path.name}")
        loads.append(_load_cost(subject, threads))
    sessions = [opened(subject, threads) for subject in subjects]
    batches = [1 if subject.single else batch for subject in subjects]
    note(f"time    {len(subjects)} files in turns, {2 * seconds:g} s each")
    single = _in_turns([one_call(one, of, 1) for one, of in zip(sessions, subjects, strict=True)], seconds)
    calls = [one_call(one, of, size) for one, of, size in zip(sessions, subjects, batches, strict=True)]
    many = _in_turns(calls, seconds)
    return [
        Timing(
            median_ms=_median_and_p99(ones)[0],
            p99_ms=_median_and_p99(ones)[1],
            calls=len(ones),
            images_per_second=size / statistics.median(some),
            batch=size,
            load_ms=1000 * load,
            memory_bytes=memory,
            size_bytes=subject.path.stat().st_size,
        )
        for subject, ones, some, size, (load, memory) in zip(subjects, single, many, batches, loads, strict=True)
    ]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image with one thread: median, and what 99 of 100 calls do not exceed; and the CPU."""

    median_ms: float
    p99_ms: float
    cpu: str

    @classmethod
    def of(cls, subject: Subject, *, seconds: float = 1.0) -> Latency:
        """Time a file alone for some seconds. Raises: as :func:`time_files`."""
        (times,) = _in_turns([one_call(open_timed(subject.path, 1), subject, 1)], seconds)
        return cls(*_median_and_p99(times), cpu_name())


def _median_and_p99(times: list[float]) -> tuple[float, float]:
    """In milliseconds."""
    return 1000 * statistics.median(times), 1000 * float(np.percentile(times, 99, method="higher"))


def open_timed(path: Path, threads: int) -> Any:
    """A session as a device opens it: all optimisations, a fixed number of threads."""
    options = session_options(optimise=True)
    options.intra_op_num_threads = threads
    return open_session(path, options)


def opened(subject: Subject, threads: int) -> Any:
    """The file in its runtime: a session of onnxruntime, or what has its two methods that are used here."""
    if subject.runtime == ONNXRUNTIME:
        return open_timed(subject.path, threads)
    return _Session(subject, threads)


class _Session:
    """Another runtime's engine behind the methods of a session."""

    def __init__(self, subject: Subject, threads: int) -> None:
        self._model = open_model(subject.runtime, subject.path, threads=threads)

    def get_inputs(self) -> list[_Input]:
        """The one input."""
        return [_Input("images", "tensor(uint8)" if self._model.takes_uint8 else "tensor(float)")]

    def run(self, _: None, inputs: Mapping[str, NDArray[Any]]) -> None:
        """One call."""
        self._model.run(inputs["images"])


@dataclass(frozen=True)
class _Input:
    name: str
    type: str


def one_call(session: Any, subject: Subject, count: int) -> Callable[[], None]:
    """One call with ``count`` random images."""
    (source,) = session.get_inputs()
    draw = np.random.default_rng(0)
    pixels: NDArray[Any] = draw.integers(0, 256, (count, *subject.shape), dtype=np.uint8)
    images = pixels if source.type == "tensor(uint8)" else pixels.astype(np.float32) / 255

    def run() -> None:
        try:
            session.run(None, {source.name: images})
        except Exception as error:  # the runtimes' own exception types share no base below Exception
            raise ModelFileError(f"{subject.path}: {subject.runtime} cannot run it ({error})") from error

    return run


def _in_turns(calls: Sequence[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds of each call, per file, after a first call that does not count."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    while any(sum(row) < seconds for row in times):
        for call, row in zip(calls, times, strict=True):
            end = time.perf_counter() + TURN
            while not row or time.perf_counter() < end:
                begin = time.perf_counter()
                call()
                row.append(time.perf_counter() - begin)
    return times


def _load_cost(subject: Subject, threads: int) -> tuple[float, int]:
    """Seconds and bytes of loading a file, in a new process that holds no other."""
    words = [sys.executable, "-m", "robustq.export.load_cost", str(subject.path.absolute()), str(threads)]
    try:
        done = subprocess.run(
            [*words, *map(str, subject.shape), subject.runtime],
            capture_output=True,
            text=True,
            timeout=LONGEST_LOAD,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelFileError(f"{subject.path}: not loaded and run within {LONGEST_LOAD:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelFileError(f"{subject.path}: cannot be loaded in a process of its own ({last[:300]})")
    seconds, grown = json.loads(done.stdout)
    return float(seconds), int(grown)


def cpu_name() -> str:
    """The CPU, and whether it multiplies bytes (VNNI), which decides what integers gain."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown CPU"
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    return f"{name} {'with' if 'vnni' in text else 'without'} VNNI"
