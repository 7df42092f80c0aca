"""The command line: parses, calls, prints. Heavy imports are inside the commands."""

from __future__ import annotations

from robustq.cli.program import app, main

__all__ = ["app", "main"]
