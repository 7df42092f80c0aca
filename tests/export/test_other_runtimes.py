"""Answers of files in other runtimes, each in an environment of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.runtimes import RUNTIMES, Runtime, prepare, run
from robustq.export.formats import build
from robustq.export.parity import Agreement, bound_of, compare, logits_of
from robustq.export.runtime_limits import not_for
from robustq.models.quant.folding import fold
from tests.export.exported import RUNNABLE, net, parsed, written
from tests.models.small_nets import small_spec, trained

NAMES = ("onnxruntime-1.18.1", "onnxruntime-1.23.2", "onnxruntime-web-1.30.0", "openvino-2026.4.1")
CHOSEN = [each for each in RUNTIMES if each.name in NAMES]

SETTINGS = {"openvino": "f32"}
"""Family -> the setting that files are asked to agree in; of all others the default."""

LIMITED = {"onnxruntime-1.18.1": "onnxruntime up to 1.20.1", "openvino-2026.4.1": "OpenVINO at any setting"}
"""Runtime -> how the sentence begins that says a file is not for it."""


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda runtime: str(runtime.name))
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runtime, Path]]:
    runtime: Runtime = request.param
    if runtime.kind == "node" and shutil.which("npm") is None:
        pytest.skip("Node.js and npm are not installed")
    folder = tmp_path_factory.mktemp("environments")
    yield runtime, prepare(runtime, folder)
    shutil.rmtree(folder)  # 150 MB


def asked(installed: tuple[Runtime, Path], folder: Path, bits: int, name: str) -> Agreement | str:
    """Agreement with the folded network, or why the runtime refuses the file."""
    runtime, environment = installed
    made = net(bits)
    reference = logits_of(made.folded, made.x, label="PyTorch")
    assert len(set(reference.argmax(dim=1).tolist())) > 5  # a network of one class would agree with any file
    images = folder / "images.npy"
    np.save(images, made.x.numpy())
    setting = SETTINGS.get(runtime.family, "default")
    logits, report = run(runtime, environment, setting, written(folder, bits, name), images)
    if logits is None:
        return str(report["refused"])
    assert report["version"] == runtime.version
    return compare(reference, logits, bound=bound_of(made.spec))


@pytest.mark.slow
def test_answers_are_the_networks(installed: tuple[Runtime, Path], tmp_path: Path) -> None:
    for bits, name in ((4, "qcdq"), (4, "integer"), (4, "packed"), (3, "packed")):
        found = asked(installed, tmp_path, bits, name)
        assert isinstance(found, Agreement) and found.different_top1 == 0 and found.holds, f"{name}: {found}"


@pytest.mark.slow
def test_at_one_bit_the_file_says_where_its_answers_are_not_the_networks(
    installed: tuple[Runtime, Path], tmp_path: Path
) -> None:
    for name in RUNNABLE:
        sentences = not_for(parsed(1, name), net(1).spec)
        is_limited = any(one.startswith(LIMITED.get(installed[0].name, "no such runtime")) for one in sentences)
        found = asked(installed, tmp_path, 1, name)
        assert is_limited != (isinstance(found, Agreement) and found.same_answers), f"{name}: {found}"


@pytest.mark.slow
def test_finn_has_integer_thresholds_where_sums_share_a_scale(tmp_path: Path) -> None:
    (finn,) = (each for each in RUNTIMES if each.family == "finn")
    environment = prepare(finn, tmp_path)
    spec = dataclasses.replace(small_spec(4), shared_sum_scale=True)
    folded, x = fold(trained(spec), spec), net(4).x[:20]
    reference = logits_of(folded, x, label="PyTorch")
    file, images = tmp_path / "shared.onnx", tmp_path / "images.npy"
    onnx.save(build("qonnx", folded, spec), file)
    np.save(images, x.numpy())
    for setting in finn.settings:
        logits, report = run(finn, environment, setting, file, images)
        assert logits is not None, report
        found = compare(reference, logits)
        assert found.different_top1 == 0 and found.holds, f"{setting}: {found}"
    assert (report["integer_layers"], report["float_layers"]) == (10, 0)
    assert report["scalar_multipliers_before_sums"] == 0 and report["thresholds_integer"]
