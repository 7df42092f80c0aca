"""Networks, their quantizers and weights: bit widths in, Brevitas layers out."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch


class _LazyDynamo:
    """Stands in for ``torch._dynamo`` while Brevitas is imported; any other attribute loads the real module."""

    is_compiling = staticmethod(torch.compiler.is_compiling)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch._dynamo"), name)


def _import_brevitas() -> None:
    """Import Brevitas without ``torch._dynamo``, of which it needs only ``is_compiling``.

    Its 300 modules take as long to import as torch. ``torch.compiler.is_compiling`` is the same function.
    """
    if "brevitas" in sys.modules or "torch._dynamo" in sys.modules:
        return
    stand_in = _LazyDynamo()
    torch._dynamo = stand_in  # type: ignore[assignment]
    try:
        importlib.import_module("brevitas")
    finally:
        if vars(torch).get("_dynamo") is stand_in:  # an import of the real module replaces it
            del torch._dynamo


_import_brevitas()
