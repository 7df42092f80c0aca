"""Logits of a QONNX file by qonnx's executor: the protocol is told in benchmarks/runtimes.py. It computes in float."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version

import numpy as np
import qonnx.core.onnx_exec
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.util.cleanup import cleanup_model

BATCH = 20


def main() -> None:
    """Run the file; exit with the reason where qonnx refuses it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=["default"], default="default")
    arguments = parser.parse_args()
    images = np.load(arguments.images)
    try:
        # The executor needs a concrete batch size: with a symbolic one it reports a shape mismatch with 0.
        model = cleanup_model(ModelWrapper(arguments.file), override_inpsize=BATCH)
        source, sink = model.graph.input[0].name, model.graph.output[0].name
        logits = []
        for place in range(0, len(images), BATCH):
            part = images[place : place + BATCH]
            full = np.zeros((BATCH, *images.shape[1:]), np.float32)  # a short last batch is filled up
            full[: len(part)] = part
            logits.append(qonnx.core.onnx_exec.execute_onnx(model, {source: full})[sink][: len(part)])
    except Exception as error:  # its operators raise whatever numpy, onnx and onnxruntime raise
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    np.save(arguments.logits, np.concatenate(logits))
    print(json.dumps({"version": version("qonnx"), "integer_layers": None, "float_layers": None}))


if __name__ == "__main__":
    main()
