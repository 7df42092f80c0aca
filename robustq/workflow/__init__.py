"""Whole jobs built from the rooms below: train, harden, attack, export, re-check, quickstart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar


class Result(Mapping[str, Any]):
    """Base of the jobs' results, which are dataclasses: their fields are also keys (``result["checkpoint"]``).

    Fields are in the order of ``--json``. Those of ``FLAT`` are replaced by their own keys, those of ``OPTIONAL`` are
    left out when they are None.
    """

    FLAT: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``: plain values only."""
        found: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in self.FLAT:
                found |= _plain(value)
            elif value is not None or field.name not in self.OPTIONAL:
                found[field.name] = _plain(value)
        return found

    @cached_property
    def _document(self) -> dict[str, Any]:
        return self.to_dict()

    def __getitem__(self, key: str) -> Any:
        return self._document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
