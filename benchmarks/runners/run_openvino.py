"""Logits of an ONNX file by OpenVINO's CPU plugin. Protocol: benchmarks/runtimes.py.

Settings: default, f32 (``INFERENCE_PRECISION_HINT``). Layers are counted in the executed graph, without sums that are
fused into convolutions.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import openvino

SETTINGS = {"default": {}, "f32": {"INFERENCE_PRECISION_HINT": "f32"}}
LAYERS = {"Convolution", "FullyConnected", "MatMul", "Pooling", "Reduce"}
BATCH = 200


def main() -> None:
    """Run the file; exit with the reason if OpenVINO refuses it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=SETTINGS, default="default")
    arguments = parser.parse_args()
    images = np.load(arguments.images)
    try:
        compiled = openvino.Core().compile_model(arguments.file, "CPU", SETTINGS[arguments.setting])
        request = compiled.create_infer_request()
        parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        logits = [request.infer({0: part})[compiled.output(0)].copy() for part in parts]
    except RuntimeError as error:
        sys.exit(" ".join(str(error).split()))
    np.save(arguments.logits, np.concatenate(logits))
    executed = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [_text(info["primitiveType"]).endswith("_I8") for info in executed if _text(info["layerType"]) in LAYERS]
    version = openvino.__version__.split("-")[0]
    print(json.dumps({"version": version, "integer_layers": sum(kinds), "float_layers": len(kinds) - sum(kinds)}))


def _text(value: object) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


if __name__ == "__main__":
    main()
