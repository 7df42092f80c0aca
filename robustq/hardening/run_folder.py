"""The folder of one training run: config.json, metrics.jsonl, best.pt, last.pt, result.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from robustq.checkpoint import save_model
from robustq.errors import OutputExistsError, UsageError
from robustq.models.spec import ModelSpec
from robustq.outputs import write_text_atomically
from robustq.progress import note

RUNS = Path("runs")
LAST_HARDENED = "last-hardened"


class RunFolder:
    """Creates the folder at once (a name can only be taken once) and writes each file whole.

    Args:
        path: where; must not exist.
        config: resolved recipe, seed, device, versions.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError as error:
            raise OutputExistsError(
                f"{path} exists already; another run may have just begun: name another --out"
            ) from error
        self.path = path
        self._metrics: list[str] = []
        write_text_atomically(path / "config.json", json.dumps(config, indent=2) + "\n")

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one epoch's row to metrics.jsonl."""
        self._metrics.append(json.dumps(row))
        write_text_atomically(self.path / "metrics.jsonl", "\n".join(self._metrics) + "\n")

    def save(self, name: str, model: nn.Module, spec: ModelSpec, info: dict[str, Any]) -> None:
        """Write ``best.pt`` or ``last.pt``."""
        save_model(self.path / name, model, spec, info=info)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, the sign that the run is complete."""
        write_text_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")


def remember_hardened(run: Path) -> None:
    """Note in ``runs/last-hardened`` which run ``robustq export`` takes by default.

    The run itself is complete by then: where the note cannot be written, export needs the model's name, and no more.
    """
    try:
        RUNS.mkdir(exist_ok=True)
        write_text_atomically(RUNS / LAST_HARDENED, f"{run.absolute()}\n")
    except OSError as error:
        note(f"could not write {RUNS / LAST_HARDENED} ({error.strerror}); name the model when you export it")


def last_hardened() -> Path:
    """best.pt of the last hardened model.

    Raises:
        UsageError: nothing has been hardened below this folder yet, or the run is gone.
    """
    pointer = RUNS / LAST_HARDENED
    if not pointer.is_file():
        raise UsageError(
            f"no model given and no {pointer} here; give a model file, or run 'robustq harden MODEL' first"
        )
    model = Path(pointer.read_text(encoding="utf-8").strip()) / "best.pt"
    if not model.is_file():
        raise UsageError(f"{pointer} names {model}, which is gone; give a model file")
    return model
