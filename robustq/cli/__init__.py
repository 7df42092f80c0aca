"""The command line: parses, calls, prints. Heavy imports are inside the commands."""

from __future__ import annotations

import sys
from typing import NoReturn

from robustq.errors import STOPPED


def main() -> NoReturn:
    """Entry point, see :func:`robustq.cli.program.main`; Ctrl-C while the program is loaded is one line too."""
    try:
        from robustq.cli.program import main as run

        run()
    except KeyboardInterrupt:
        print(f"robustq: {STOPPED}", file=sys.stderr)
        sys.exit(130)
