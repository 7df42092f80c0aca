"""Whole jobs built from the rooms below: train, harden, attack, export, re-check, quickstart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any


class Result(Mapping[str, Any]):
    """Base of the jobs' results: typed attributes, and the keys of ``--json`` as ``result["checkpoint"]``."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The keys of ``--json``, with plain values."""

    @cached_property
    def _json(self) -> dict[str, Any]:
        return self.to_dict()

    def __getitem__(self, key: str) -> Any:
        return self._json[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._json)

    def __len__(self) -> int:
        return len(self._json)
