"""Quantize a float .onnx by NNCF, in an environment that has nncf and onnx and no robustq.

    python quantize_nncf.py FLOAT.onnx IMAGES.npy QUANTIZED.onnx

IMAGES.npy: float32 (N, C, H, W), the images of the calibration. Prints NNCF's version.
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import onnx


def main() -> None:
    """Quantize with NNCF's defaults."""
    source, images, target = sys.argv[1:]
    model = onnx.load(source)
    name = model.graph.input[0].name
    rows = nncf.Dataset(np.load(images), lambda image: {name: image[None]})
    onnx.save(nncf.quantize(model, rows, subset_size=len(np.load(images))), target)
    print(nncf.__version__.split("+")[0])


if __name__ == "__main__":
    main()
