"""Files give the network's answers in old onnxruntime versions and under Node.js, each in an environment of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runtimes import RUNTIMES, Runtime, prepare, run
from robustq.export.parity import bound_of, compare, logits_of
from tests.export.exported import RUNNABLE, net, written

CHOSEN = [
    each for each in RUNTIMES if each.name in ("onnxruntime-1.18.1", "onnxruntime-1.23.2", "onnxruntime-web-1.30.0")
]


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


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_answers_are_the_networks(installed: tuple[Runtime, Path], tmp_path: Path, bits: int) -> None:
    runtime, environment = installed
    made = net(bits)
    reference = logits_of(made.folded, made.x, label="PyTorch")
    assert len(set(reference.argmax(dim=1).tolist())) > 5  # a network of one class would agree with any file
    images = tmp_path / "images.npy"
    np.save(images, made.x.numpy())
    for name in RUNNABLE:
        logits, told = run(runtime, environment, "default", written(tmp_path, bits, name), images)
        assert logits is not None and told["version"] == runtime.version, told
        found = compare(reference, logits, bound=bound_of(made.spec))
        assert found.different_top1 == 0 and found.holds, f"{name}: {found}"


def test_the_table_names_every_version_once() -> None:
    assert len(CHOSEN) == 3
    assert len({each.name for each in RUNTIMES}) == len(RUNTIMES)
    assert all(pin.count("==") == 1 or each.kind == "node" for each in RUNTIMES for pin in each.packages)
