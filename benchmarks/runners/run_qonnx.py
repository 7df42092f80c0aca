"""Logits of a QONNX file by qonnx's executor, in float. Protocol: benchmarks/runtimes.py."""

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
    """Run the file; exit with the reason if qonnx refuses it."""
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
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            full = np.zeros((BATCH, *images.shape[1:]), np.float32)  # a short last batch is padded
            full[: len(part)] = part
            logits.append(qonnx.core.onnx_exec.execute_onnx(model, {source: full})[sink][: len(part)])
    except Exception as error:  # exceptions of numpy, onnx and onnxruntime
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    np.save(arguments.logits, np.concatenate(logits))
    print(json.dumps({"version": version("qonnx"), "integer_layers": None, "float_layers": None}))


if __name__ == "__main__":
    main()
