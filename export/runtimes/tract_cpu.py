"""Tract, which runs on one thread."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from robustq.errors import UsageError
from robustq.export.runtimes.engine import Opening, in_batches

TYPES = {"float32": "f32", "uint8": "u8"}


class Tract:
    """See :class:`robustq.export.runtimes.engine.Engine`. A file is made ready anew for each shape of its input."""

    def __init__(self, opening: Opening) -> None:
        import tract

        if opening.threads > 1:
            raise UsageError(f"tract runs on one thread, not on {opening.threads}; give --threads 1")
        self.version = str(tract.version())
        self._path = str(opening.path)
        self._ready: dict[str, Any] = {}
        tract.onnx().load(self._path)  # refuses here what it cannot read

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """See the protocol."""
        return in_batches(self._run, images)

    def _run(self, images: NDArray[Any]) -> NDArray[Any]:
        import tract

        form = ",".join([*map(str, images.shape), TYPES[str(images.dtype)]])
        if form not in self._ready:
            model = tract.onnx().load(self._path)
            model.set_input_fact(0, form)
            self._ready[form] = model.into_model().into_runnable()
        found: NDArray[Any] = self._ready[form].run([images])[0].to_numpy()
        return found

    def close(self) -> None:
        """Nothing was started."""
