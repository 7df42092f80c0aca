"""Output of export --targets, and the lines of a target's check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from robustq.export.targets.schema import find_target, target_names
from robustq.report.text import percent, with_interval


def target_lines(*, as_json: bool = False) -> list[str]:
    """The targets that come with robustq, a line each, or as JSON."""
    found = [find_target(name) for name in target_names()]
    if as_json:
        shown = ("name", "summary", "format", "input", "runtime", "replay")
        return [json.dumps([{key: getattr(one, key) for key in shown} for one in found], indent=2)]
    width = max(len(one.name) for one in found)
    return [
        f"{one.name.ljust(width)}  {one.summary} ({one.format}, {one.input} pixels; "
        f"{'no runtime installs here' if one.runtime is None else f'checked in {one.runtime}'})"
        for one in found
    ]


def check_lines(check: Mapping[str, Any]) -> list[str]:
    """Which check happened, and the same images in each runtime."""
    lines = [f"target  {check['name']}: {check['text']}"]
    return lines + [f"replay  {replayed_in(one)}" for one in check["replayed"]]


def replayed_in(found: Mapping[str, Any]) -> str:
    """The counts of one runtime in a line."""
    name = f"{found['runtime']} {found['version']}"
    if found["refused"] is not None:
        return f"{name}: refused ({found['refused']})"
    clean = percent(found["clean_accuracy"])
    robust = with_interval(found["robust_accuracy"], found["robust_interval"])
    return (
        f"{name}: clean {clean}, the same adversarial images leave {robust}; {found['different']} of "
        f"{found['images']} clean images with another class"
    )
