"""Real processes of the command line, forked from one that has torch loaded: a start costs milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.cli.conftest import Outcome

LOADED = ["train", "export", "attack", "quickstart", "info", "resume", "replay"]
PATIENCE = 300.0
"""Seconds until a process that should have ended long ago is given up."""


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(f"robustq.workflow.{name}" for name in LOADED), "sklearn.datasets"])
    return context


class Call:
    """One call that runs beside this process.

    Args:
        folder: its working folder.
        words: of the command line.
        prepare: called in the process with ``values`` before the program starts.
    """

    def __init__(
        self,
        server: ForkServerContext,
        folder: Path,
        *words: str | Path,
        prepare: Callable[..., None] | None = None,
        values: tuple[Any, ...] = (),
    ) -> None:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        self._told = [reader for reader, _ in pipes]
        writers = [writer for _, writer in pipes]
        arguments = ([str(word) for word in words], folder, writers, prepare, values)
        self.process: BaseProcess = server.Process(target=_run, args=arguments)
        self.process.start()
        for writer in writers:
            writer.close()

    def end(self) -> Outcome:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        assert code is not None
        out, err = (open(reader.fileno(), closefd=False).read() for reader in self._told)  # noqa: SIM115
        return Outcome(code, out, err)


def _run(
    words: list[str],
    folder: Path,
    told: list[Connection],
    prepare: Callable[..., None] | None,
    values: tuple[Any, ...],
) -> None:
    for handle, pipe in zip((1, 2), told, strict=True):  # what native code writes too
        os.dup2(pipe.fileno(), handle)
    sys.stdout, sys.stderr = (open(handle, "w", buffering=1) for handle in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    import torch

    from robustq.cli.program import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*values)
    sys.argv = ["robustq", *words]
    main()


def little_memory(megabytes: int) -> None:
    """Allow this process so much address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def full_disk(size: int) -> None:
    """No file may grow beyond ``size`` bytes: writing fails in the kernel, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
