"""What this machine's processor has instructions for, as far as torch tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def lacks_bfloat16() -> bool:
    """Whether it would imitate products of bfloat16, slowly; False where nothing is known (other than x86)."""
    found = _capabilities()
    return found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16"))


def slows_bfloat16() -> bool:
    """Whether it multiplies bfloat16 at half the pace of float32, by instructions of its own.

    So do Intel's cores whose pace lies in AMX, where that is hidden, as in many a virtual machine
    (docs/results/training-cost.md). They are known by 16-bit floats of the other kind, which came with AMX.
    """
    found = _capabilities()
    made_for_amx = str(found.get("cpu_name", "")).startswith("Intel") and bool(found.get("avx512_fp16"))
    return made_for_amx and not found.get("amx_bf16")


def adds_up_bytes() -> bool:
    """Whether it adds products of 8-bit numbers up in 32 bits (VNNI), where pairs of them would overflow 16."""
    found = _capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni"))


def _capabilities() -> Mapping[str, Any]:
    known: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known
