"""OpenVINO's CPU plugin."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustq.export.runtimes.engine import Opening


class OpenVino:
    """See :class:`robustq.export.runtimes.engine.Engine`; settings are properties of ``compile_model``."""

    def __init__(self, opening: Opening) -> None:
        import openvino

        self.version = str(openvino.__version__).split("-")[0]
        properties: dict[str, Any] = dict(opening.settings)
        if opening.threads:
            properties["INFERENCE_NUM_THREADS"] = opening.threads
        self._compiled = openvino.Core().compile_model(str(opening.path), "CPU", properties)
        self._request = self._compiled.create_infer_request()

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """See the protocol."""
        found: NDArray[Any] = self._request.infer({0: images})[self._compiled.output(0)]
        return np.array(found)  # the request writes into the same memory again

    def close(self) -> None:
        """Nothing was started."""
