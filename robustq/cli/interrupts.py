"""Ctrl-C that a library swallows is remembered, so that what then breaks is not taken for a fault of robustq."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """``with Interrupts() as interrupts:`` raises KeyboardInterrupt as Python does, and knows afterwards that it did.

    torch, cut off in the middle of its imports, goes on with half a module and fails later with an AttributeError.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # Anything else than Python's own handler (ignored, a caller's, another thread's) is left in place.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                self._before = signal.signal(signal.SIGINT, self._handle)
            except ValueError:  # not the main thread, which alone gets signals
                self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt
