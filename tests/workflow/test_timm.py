"""Networks of timm by name: names, weights as timm saves them, and the deployed file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import robustq
from robustq.errors import UsageError
from robustq.models.fx.factory import float_network
from robustq.models.spec import ModelSpec, build_model, check_architecture
from robustq.workflow.float_check import published_normalisation

NAME = "test_efficientnet"  # timm's own: MobileNet's blocks with its fused norm layer, 0.1 M parameters
FAST = ("epochs=1", "train_images=16", "batch_size=8", "calibration_images=16", "monitor_images=8", "lr=0.001")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as timm's training script writes it, and images of 32 pixels."""
    place = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=4)
    state = network.state_dict()
    ema = {name: value + 1 if name.endswith("num_batches_tracked") else value for name, value in state.items()}
    torch.save({"epoch": 3, "arch": NAME, "state_dict": state, "state_dict_ema": ema, "metric": 12.5}, place / "w.pth")
    draws = np.random.default_rng(0)
    arrays = {f"x_{part}": draws.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(place / "images.npz", **arrays, **{f"y_{part}": np.arange(40) % 4 for part in ("train", "test")})  # type: ignore[arg-type]
    return place


@pytest.mark.slow
def test_harden_and_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("robustq.workflow.float_check.note", notes.append)
    data = str(folder / "images.npz")
    options = {"architecture": f"timm:{NAME}", "data": data, "bits": 8, "recipe": "natural", "overrides": FAST}
    with pytest.raises(UsageError, match="--normalisation imagenet for timm's own weights"):
        robustq.harden_model(folder / "w.pth", **options, out=folder / "none")  # type: ignore[arg-type]
    run = robustq.harden_model(folder / "w.pth", **options, checks=False, out=folder / "run")  # type: ignore[arg-type]
    assert f"timm's weights of timm:{NAME} expect --normalisation imagenet" in notes[-1]
    made = robustq.export_model(run["checkpoint"], images=0, recheck=False, max_drift=1.0, out=folder / "file")
    assert made["shortfalls"] == []
    assert all("Conv" not in name and "Gemm" not in name for name in made["float_layers"])


def test_the_float_network_is_timms_bit_for_bit() -> None:
    spec = ModelSpec(f"timm:{NAME}", 32, 32, 4, 3, 32, "images.npz", None, tuple("abcd"))
    torch.manual_seed(1)
    network = build_model(spec)
    theirs = timm.create_model(NAME, num_classes=4).eval()
    assert network.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(network.state_dict())
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10", "timm has no network 'resnet10'; nearest: resnet10t"),
        ("hf-hub:someone/net", "timm has no network 'hf-hub:someone/net'"),
        ("resnet10t.c4_in1k", "timm has no weights 'c4_in1k' of resnet10t; known: resnet10t.c3_in1k"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        float_network(f"timm:{name}", classes=2)


def test_names_with_tags_and_without_a_library() -> None:
    with torch.device("meta"):
        assert float_network("timm:resnet10t.c3_in1k", classes=7).state_dict()["fc.weight"].shape[0] == 7
    with pytest.raises(UsageError, match="unknown architecture 'resnet10t'; timm's is timm:resnet10t"):
        check_architecture("resnet10t")


def test_published_normalisation() -> None:
    assert published_normalisation("timm:resnet10t.c3_in1k") == "imagenet"
    assert published_normalisation("timm:mobilenetv2_035") == "imagenet"
    assert published_normalisation("timm:vit_tiny_patch16_224") == "0.5,0.5,0.5/0.5,0.5,0.5"
    assert published_normalisation("torchvision:resnet18") is None


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="needs timm, which is not installed: pip install timm"):
        float_network("timm:resnet10t", classes=2)
    with pytest.raises(UsageError, match="unknown architecture 'resnet10t'; known"):
        check_architecture("resnet10t")
