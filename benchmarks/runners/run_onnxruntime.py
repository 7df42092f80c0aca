"""Logits of an ONNX file by onnxruntime's Python package. Protocol: benchmarks/runtimes.py.

Settings: default, disabled (no graph optimisation), exact (``session.x64quantprecision``). Layers are counted in
onnxruntime's profile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile

import numpy as np
import onnxruntime

INTEGER = {"QGemm", "ConvInteger", "MatMulInteger"}  # and QLinear...
FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul"} | {
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
}


def main() -> None:
    """Run the file; exit with the reason if onnxruntime refuses it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=["default", "disabled", "exact"], default="default")
    arguments = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if arguments.setting == "disabled":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if arguments.setting == "exact":
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        try:
            session = onnxruntime.InferenceSession(arguments.file, options, providers=["CPUExecutionProvider"])
            logits = session.run(None, {session.get_inputs()[0].name: np.load(arguments.images)})[0]
        except Exception as error:  # onnxruntime's exceptions have no other common base
            sys.exit(str(error).splitlines()[0])
        with open(session.end_profiling(), encoding="utf-8") as profile:
            events = json.load(profile)
    np.save(arguments.logits, logits)
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    integer = sum(name.startswith("QLinear") or name in INTEGER for name in ran)
    in_float = sum(name in FLOAT for name in ran)
    print(
        json.dumps({"version": onnxruntime.__version__, "integer_layers": integer, "float_layers": in_float}),
        flush=True,
    )


if __name__ == "__main__":
    main()
