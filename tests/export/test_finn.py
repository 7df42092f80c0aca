"""FINN converts and streamlines the default QONNX file, in an environment of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.runtimes import RUNTIMES, prepare, run
from robustq.export.formats import build
from robustq.export.parity import compare, logits_of
from robustq.models.quant.folding import fold
from tests.export.exported import net
from tests.models.small_nets import small_spec, trained


@pytest.mark.slow
def test_one_scale_in_a_sum_leaves_integer_thresholds_alone(tmp_path: Path) -> None:
    (finn,) = (each for each in RUNTIMES if each.family == "finn")
    environment = prepare(finn, tmp_path)
    spec = dataclasses.replace(small_spec(4), shared_sum_scale=True)
    folded, x = fold(trained(spec), spec), net(4).x[:40]
    reference = logits_of(folded, x, label="PyTorch")
    file, images = tmp_path / "shared.onnx", tmp_path / "images.npy"
    onnx.save(build("qonnx", folded, spec), file)
    np.save(images, x.numpy())
    for setting in finn.settings:
        logits, told = run(finn, environment, setting, file, images)
        assert logits is not None, told
        found = compare(reference, logits)
        assert found.different_top1 == 0 and found.holds, f"{setting}: {found}"
    assert (told["integer_layers"], told["float_layers"]) == (10, 0)
    assert told["scalar_multipliers_before_sums"] == 0 and told["thresholds_integer"]
