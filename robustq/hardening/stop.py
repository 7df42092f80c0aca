"""Ctrl-C and SIGTERM as a request: the batch is finished and the state saved; a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from robustq.progress import note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """``with StopRequest() as stop:`` turns the first signal into ``stop.requested`` and the second into
    KeyboardInterrupt.

    Only the main thread of a process can take signals: in any other one nothing changes, and nothing is ever requested.
    A signal that is ignored (``nohup``, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: the request is not for it to answer
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A signal may come while this very thread writes to stderr, which Python refuses to do twice at a time.
        with contextlib.suppress(RuntimeError):
            note("stopping after this batch, then saving; once more stops at once")
