"""What this machine's processor has instructions for, as far as torch tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def lacks_bfloat16() -> bool:
    """Whether it would imitate products of bfloat16, slowly; False where nothing is known (other than x86)."""
    found = _capabilities()
    return found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16"))


def adds_up_bytes() -> bool:
    """Whether it adds products of 8-bit numbers up in 32 bits (VNNI), where pairs of them would overflow 16."""
    found = _capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni"))


def _capabilities() -> Mapping[str, Any]:
    known: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known
