"""Shared by all tests: quiet threads, and a small digits model that is trained once a session."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch is loaded: threads that wait by spinning make tiny networks ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell's background job begins with Ctrl-C ignored, and robustq keeps it so; tests that send it mean to be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of a float ResNet-8 after four epochs on the digits (some 90% clean)."""
    import robustq

    out = tmp_path_factory.mktemp("float") / "run"
    robustq.train_model("digits/resnet8-float-natural", overrides=("epochs=4",), device="cpu", out=out)
    return out / "best.pt"


@pytest.fixture(scope="session")
def digits_w4a4(digits_float: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of the same network at 4 bits after one epoch of ODG-Q."""
    import robustq

    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("hardened"))  # runs/last-hardened is written below the working folder
    try:
        result = robustq.harden_model(
            digits_float, recipe="digits/resnet8-w4a4-odgq", overrides=("epochs=1",), device="cpu"
        )
    finally:
        os.chdir(before)
    return Path(result["checkpoint"])
