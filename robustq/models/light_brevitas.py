"""Brevitas loaded without torch's compiler, whose import takes as long as torch's own and longer.

Brevitas asks ``torch._dynamo`` for one function when it is imported, ``is_compiling``, and torch loads that package of
300 modules the first time its name is read. The function is ``torch.compiler.is_compiling``, which torch always has.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch


class _Compiler:
    """``torch._dynamo`` as Brevitas sees it while it is imported; whatever else is asked for loads the real one."""

    is_compiling = staticmethod(torch.compiler.is_compiling)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch._dynamo"), name)


def import_brevitas() -> None:
    """Import Brevitas, if nobody has yet; torch is left as it was found."""
    if "brevitas" in sys.modules or "torch._dynamo" in sys.modules:
        return
    stand_in = _Compiler()
    torch._dynamo = stand_in  # type: ignore[assignment]
    try:
        importlib.import_module("brevitas")
    finally:
        if vars(torch).get("_dynamo") is stand_in:  # importing the real one would have put it there
            del torch._dynamo
