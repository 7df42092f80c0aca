"""The command line: parses, calls, prints. Everything heavy is imported inside the command that needs it.

One file holds one command; :mod:`robustq.cli.program` puts them together.
"""

from __future__ import annotations

from robustq.cli.program import app, main

__all__ = ["app", "main"]
