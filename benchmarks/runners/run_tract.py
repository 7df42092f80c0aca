"""Logits of an ONNX file by tract. Protocol: benchmarks/runtimes.py. Layers are not reported."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import tract


def main() -> None:
    """Run the file; exit with the reason if tract refuses it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=["default"], default="default")
    arguments = parser.parse_args()
    images = np.load(arguments.images)
    try:
        model = tract.onnx().load(arguments.file)
        model.set_input_fact(0, ",".join(map(str, images.shape)) + ",f32")
        logits = model.into_model().into_runnable().run([images])[0].to_numpy()
    except tract.TractError as error:
        causes = str(error).split("Stack backtrace")[0].strip().splitlines()
        sys.exit(causes[-1].strip()[:300])
    np.save(arguments.logits, logits)
    print(json.dumps({"version": tract.version(), "integer_layers": None, "float_layers": None}))


if __name__ == "__main__":
    main()
