"""The machine of a result, and two results of recheck side by side: what differs, and whether saturation explains it.

Without VNNI, x86 CPUs multiply unsigned by signed bytes with ``vpmaddubsw``, whose sums of two products stop at 16 bits
(u8s8 saturation). onnxruntime's run ``exact`` avoids it (:data:`robustq.export.parity.RUNS`).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robustq.errors import UsageError
from robustq.export.timing import cpu_name
from robustq.tables import misfit, read_table

ARITHMETIC = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Flags of a CPU, as Linux names them, that decide which kernels a runtime takes."""

EXACT_BYTES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Flags of x86 CPUs whose products of bytes do not saturate."""

OPTIMISED, EXACT = "optimised", "exact"

SETTINGS = ("suite", "images", "epsilon", "seed", "data")
"""Keys that must be equal for two results to be comparable."""

_SHAPE = {
    "sha256": str,
    "machine": {"cpu": str, "flags": [str], "architecture": str, "onnxruntime": str},
    "parity": dict,
    "clean_accuracy": int | float,
    "robust_accuracy": int | float,
    "suite": str,
    "images": int,
    "epsilon": int | float,
    "seed": int,
    "data": str,
    "judge": str,
}


@dataclass(frozen=True)
class Machine:
    """The machine of a result.

    Args:
        cpu, architecture: its name and kind (``x86_64``).
        flags: those of :data:`ARITHMETIC` that it has; empty where the system does not tell.
        onnxruntime: version.
    """

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    onnxruntime: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "flags": list(self.flags)}


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(cpu_name(), platform.machine(), _flags(), version("onnxruntime"))


def _flags() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    lines = (line.split(":", 1) for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    found = next((set(parts[1].split()) for parts in lines if len(parts) == 2), set())
    return tuple(flag for flag in ARITHMETIC if flag in found)


def read_result(path: Path) -> dict[str, Any]:
    """A result of ``robustq recheck --out``. UsageError if it is none."""
    table = read_table(path, json.loads, error=UsageError)
    wrong = misfit(table, _SHAPE)
    if wrong is not None:
        raise UsageError(f"{path}: has no {wrong} of a re-check; give a file that 'robustq recheck --out' wrote")
    return table


def saturates(machine: Mapping[str, Any]) -> bool | None:
    """Whether products of bytes saturate on a machine, as in results; None where its flags are not known."""
    if not machine["flags"]:
        return None
    return "avx2" in machine["flags"] and not EXACT_BYTES & {*machine["flags"]}


def compare_results(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between two results of recheck, in sentences; the last one is on saturation.

    Args:
        here, there: documents of ``recheck --json``, checked by :func:`read_result`.
    """
    lines = []
    if here["sha256"] != there["sha256"]:
        lines.append("the files differ (sha256): the results are of two files")
    settings = [key for key in SETTINGS if here[key] != there[key]]
    if settings:
        lines.append(f"settings differ: {', '.join(f'{key} {here[key]} here, {there[key]} there' for key in settings)}")
    mine, other = here["machine"], there["machine"]
    for name in ("cpu", "architecture", "onnxruntime"):
        if mine[name] != other[name]:
            lines.append(f"{name}: {mine[name]} here, {other[name]} there")
    only = [sorted({*one["flags"]} - {*two["flags"]}) for one, two in ((mine, other), (other, mine))]
    for where, names in zip(("here", "there"), only, strict=True):
        lines += [f"CPU flags {where} alone: {', '.join(names)}"] if names else []
    if here["judge"] != there["judge"]:
        lines.append(f"judge: {here['judge']} here, {there['judge']} there")
    answers = _answers(here, there)
    lines += answers
    if not answers:
        return [*lines, "the answers that were counted do not differ"]
    return [*lines, _explained(here, there)]


def _answers(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Differences of accuracies, and of the agreement with the network."""
    lines = []
    for name in ("clean_accuracy", "robust_accuracy"):
        if here[name] != there[name]:
            shown = name.replace("_", " ")
            lines.append(f"{shown}: {here[name]:.1%} here, {there[name]:.1%} there")
    for run in here["parity"]:
        counts = [_different(one, run) for one in (here, there)]
        if None not in counts and counts[0] != counts[1]:
            lines.append(
                f"parity {run}: {counts[0]} images with another class than the network here, {counts[1]} there"
            )
    return lines


def _different(result: Mapping[str, Any], run: str) -> int | None:
    entry = result["parity"].get(run)
    count = entry.get("different_top1") if isinstance(entry, dict) else None
    return count if isinstance(count, int) else None


def _explained(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Whether u8s8 saturation explains different answers: the run ``exact`` is the proof."""
    if here["sha256"] != there["sha256"] or any(here[key] != there[key] for key in SETTINGS):
        return "u8s8 saturation: cannot be told from results of other files or settings"
    kinds = {where: saturates(one["machine"]) for where, one in (("here", here), ("there", there))}
    if None in kinds.values():
        return "u8s8 saturation: cannot be told, the flags of a CPU are not known"
    if not any(kinds.values()):
        return "u8s8 saturation does not explain it: neither CPU saturates"
    if all(kinds.values()):
        return "u8s8 saturation does not explain it: both CPUs saturate alike"
    where, result = ("here", here) if kinds["here"] else ("there", there)
    optimised, exact = (_different(result, run) for run in (OPTIMISED, EXACT))
    if optimised is None or exact is None:
        return f"u8s8 saturation may explain it: the CPU {where} has no VNNI; there is no run '{EXACT}' to tell"
    if exact < optimised:
        return (
            f"u8s8 saturation explains it: the CPU {where} has no VNNI, and with exact products {exact} instead of "
            f"{optimised} images get another class than the network"
        )
    return (
        f"u8s8 saturation does not explain it: the CPU {where} has no VNNI, but exact products change nothing "
        f"({exact} images with another class)"
    )
