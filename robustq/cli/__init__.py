"""The command line: parses, calls, prints. Heavy imports are inside the commands."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import NoReturn

from robustq.errors import STOPPED
from robustq.memory import caused_by_memory, out_of_memory


def main() -> NoReturn:
    """Entry point of a process, see :func:`robustq.cli.program.main`; Ctrl-C and too little memory while the program is
    loaded are one line too, and Ctrl-C after the program has ended changes nothing.
    """
    try:
        try:
            from robustq.cli.program import main as run

            run()
        finally:
            _ignore_interrupts()
    except KeyboardInterrupt:
        _ignore_interrupts()
        print(f"robustq: {STOPPED}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not caused_by_memory(error):
            raise
        print(f"robustq: {out_of_memory(error)}", file=sys.stderr)
        sys.exit(2)


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C until the process is gone.

    While Python ends, which takes a moment with torch loaded, it sets the default action again, by which the signal
    kills without an exit code; an ignored signal stays ignored.
    """
    with suppress(ValueError):  # only the main thread receives signals
        signal.signal(signal.SIGINT, signal.SIG_IGN)
