"""Commands under a limit of address space (``ulimit -v``).

Native code that gets no memory may end the process by itself: OpenBLAS and libgomp with lines of their own when they
start threads, oneDNN by a null pointer. A second process stays to say why.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from typing import NoReturn

from robustq.errors import STOPPED, OutOfMemoryError, RunStoppedError
from robustq.memory import caused_by_memory, is_limited

LIBRARIES = ("numpy", "torch", "onnxruntime", "scipy.linalg")
"""The packages with large native code, in the order in which commands load them."""

LONGEST_LOADING = 30
"""Seconds of computing, 5 times what it takes on one core; OpenBLAS may wait for memory without end."""

_ENOUGH_FOR_ALL_THREADS = 1 << 22
"""Elements of an operation that torch divides among its threads."""

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_WATCHED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}

_FROM_TERMINAL = 0x80
"""SI_KERNEL of sigaction(2): Linux' code for signals of a terminal, such as Ctrl-C."""


def watch_for_crashes() -> None:
    """Under a limit of address space, let a copy of this process do the rest; this one waits and ends as it does.

    Returns in the copy, and without a limit. Nothing happens where torch is loaded already: its threads do not exist
    in a copy.

    Raises:
        OutOfMemoryError: the copy could not load the libraries, or crashed later.
        RunStoppedError: Ctrl-C while the libraries were loaded.
    """
    if not is_limited() or "torch" in sys.modules or not sys.platform.startswith("linux"):
        return
    loaded, tell = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(loaded)
        _load_quietly()
        os.write(tell, b"1")
        os.close(tell)
        return
    os.close(tell)
    _wait(child, loaded, mask)


def _load_quietly() -> None:
    """Import the libraries and start their threads; end the process if memory does not suffice."""
    streams = [os.dup(number) for number in (1, 2)]
    quiet = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(quiet, number)
    os.close(quiet)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # OpenBLAS without memory sends it to its own process
    seconds = resource.getrlimit(resource.RLIMIT_CPU)
    if seconds[0] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_LOADING, seconds[1]))
    try:
        for name in LIBRARIES:
            importlib.import_module(name)
        sys.modules["torch"].ones(_ENOUGH_FOR_ALL_THREADS).exp_()
    except Exception as error:  # a broken installation is answered where the command needs the library
        if caused_by_memory(error):
            os._exit(1)
    resource.setrlimit(resource.RLIMIT_CPU, seconds)
    signal.signal(signal.SIGINT, before)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)


def _wait(child: int, loaded: int, mask: set[int | signal.Signals]) -> NoReturn:
    interrupted, status = False, 0
    while True:
        received = signal.sigwaitinfo(_WATCHED)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            continue
        interrupted = interrupted or received.si_signo == signal.SIGINT
        if received.si_code != _FROM_TERMINAL:  # a terminal sends its signals to both processes
            os.kill(child, received.si_signo)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    code = os.waitstatus_to_exitcode(status)
    ready = bool(os.read(loaded, 1))
    if not ready and interrupted:
        raise RunStoppedError(STOPPED)
    if not ready and -code not in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        raise OutOfMemoryError("out of memory while libraries are loaded; allow this process more (ulimit -v)")
    if -code in _CRASHES:
        name = signal.Signals(-code).name
        raise OutOfMemoryError(f"out of memory ({name} in native code); allow this process more (ulimit -v)")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.stdout.flush()
    os._exit(code)
