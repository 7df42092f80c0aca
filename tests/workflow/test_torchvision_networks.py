"""ResNet-18, ours and torchvision's, and MobileNetV2 from a state dict to a deployed integer file, at 64 x 64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import to_float
from robustq.models.fx.factory import float_network
from robustq.workflow.export import export_model
from robustq.workflow.harden import harden_model
from tests.models.small_nets import digits

SIDE = 64


def enlarged(images: Tensor) -> Tensor:
    """uint8 (N, 1, 8, 8) -> (N, 3, 64, 64): each pixel a patch, each channel its own brightness."""
    large = images.repeat_interleave(8, 2).repeat_interleave(8, 3).float()
    return torch.cat([large, large * 0.7 + 40, 255 - large], dim=1).to(torch.uint8)


def dataset(folder: Path) -> Path:
    path = folder / "digits64.npz"
    arrays = {}
    for part, split, count in (("train", "train", 400), ("test", "test", 200)):
        images, labels = digits(split)
        arrays[f"x_{part}"] = enlarged(images[:count]).permute(0, 2, 3, 1).numpy()
        arrays[f"y_{part}"] = labels[:count].numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def trained(name: str, *, steps: int) -> dict[str, Tensor]:
    """A state dict of the float network after a short training, its running statistics taken anew at the end."""
    torch.manual_seed(0)
    network = float_network(f"torchvision:{name}", classes=10).train()
    images, labels = digits("train")
    x = to_float(enlarged(images))
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (32,))
        optimiser.zero_grad()
        functional.cross_entropy(network(x[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average over all batches
    with torch.no_grad():
        for part in torch.split(x[:256], 64):
            network(part)
    return network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "layers", "sums"),
    [
        ("resnet18", "torchvision:resnet18", 20 + 1, 8),
        ("resnet18", None, 20 + 1, 8),  # the same weights, recognised as our own ResNet-18
        ("mobilenet_v2", "torchvision:mobilenet_v2", 52 + 1, 10),
    ],
)
def test_harden_and_export(
    name: str, architecture: str | None, layers: int, sums: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained(name, steps=50), tmp_path / "weights.pt")
    run = harden_model(
        tmp_path / "weights.pt",
        bits=4,
        architecture=architecture,
        data=str(dataset(tmp_path)),
        overrides=(
            "epochs=1",
            "train_images=64",
            "batch_size=32",
            "monitor_images=16",
            "calibration_images=64",
            "lr=0.001",
        ),
        seed=0,
    )
    assert run["bits"] == 4 and run["method"] == "odgq"
    assert run["clean_accuracy"] > 0.5, "the file must be judged on a network that says something"
    for format_name in ("integer", "packed", "qcdq"):
        # After so few steps answers are close calls.
        found = export_model(run["checkpoint"], format_name=format_name, images=200, recheck=False, max_drift=1.0)
        print(name, run["clean_accuracy"], found["drift"], found["parity"])  # figures of docs/custom-networks.md
        assert found["shortfalls"] == []
        if format_name != "qcdq":
            # Everything runs as integers: convolutions and the classifier, sums, the pooling.
            assert found["float_layers"] == []
            assert len(found["integer_layers"]) == layers + sums + 1
