"""The kit of an export folder, run as on a device: an interpreter that has numpy and onnxruntime, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from robustq.data import to_float
from robustq.export.kit import KIT, write_kit
from tests.export.exported import net, written
from tests.models.small_nets import digits

NEEDED = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")
"""onnxruntime and what its wheel requires."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages in the place of site-packages."""
    folder = tmp_path_factory.mktemp("packages")
    here = Path(sysconfig.get_path("purelib"))
    for name in NEEDED:
        if (here / name).exists():
            (folder / name).symlink_to(here / name)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A deployed file with the kit of 200 digits, attacked by noise."""
    file = written(tmp_path, 4, "packed")
    images, labels = digits()[0][:200], digits()[1][:200]
    noise = torch.randint(-40, 41, images.shape, generator=torch.Generator().manual_seed(0))
    x_adv = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    write_kit(tmp_path, file, images, labels, x_adv, about={"label": "resnet8-w4a4", "epsilon": 40 / 255})
    return file


def check(device: Path, file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run check.py without this environment's packages."""
    script = file.parent / KIT / "check.py"
    typed = ["check.py", "--seconds", "0.1", *words]
    program = f"import sys, runpy; sys.path.append({str(device)!r}); sys.argv = {typed!r}; "
    program += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    # -I: no environment variables, no user packages; -S: no site-packages.
    return subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)


def test_the_device_counts_what_the_workstation_counted(device: Path, bundle: Path) -> None:
    done = check(device, bundle)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "PASS"), done.stderr
    made, labels = net(4), digits()[1][:200]
    with np.load(bundle.parent / KIT / "images.npz") as archive:
        clean, adversarial = (torch.from_numpy(archive[name]) for name in ("clean", "adversarial"))
    with torch.no_grad():
        right = [made.folded(to_float(x)).argmax(1) == labels for x in (clean, adversarial)]
    counted, attacked = int(right[0].sum()), int((right[0] & right[1]).sum())
    assert 0 < attacked < counted < 200
    assert f"clean        {counted} of 200 right" in done.stdout
    assert f"under attack {attacked} of 200 right ({attacked / 200:.1%}); on the workstation {attacked}" in done.stdout
    assert "answers      0 of 400 differ" in done.stdout and "latency      median" in done.stdout


def test_another_file_fails(device: Path, bundle: Path, tmp_path: Path) -> None:
    """A weight of the last layer is changed: the hash tells it, and so do the answers where it matters."""
    model = onnx.load(bundle)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(largest).copy()
    values.reshape(-1)[:] = values.reshape(-1)[::-1]
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    done = check(device, bundle, str(other))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "FAIL")
    assert "other.onnx: changed: other.onnx" in done.stdout
    assert "answers      0 of" not in done.stdout


def test_other_images_fail(device: Path, bundle: Path) -> None:
    path = bundle.parent / KIT / "images.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["adversarial"] = arrays["clean"]
    np.savez_compressed(path, **arrays)
    done = check(device, bundle)
    assert done.returncode == 1 and "changed: images.npz" in done.stdout


def test_what_cannot_run_is_one_line(device: Path, bundle: Path, tmp_path: Path) -> None:
    done = check(device, bundle, str(tmp_path / "missing.onnx"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "missing.onnx" in done.stderr
    facts = tmp_path / KIT / "kit.json"
    facts.write_text(json.dumps({"file": bundle.name}))
    assert check(device, bundle).returncode == 2
