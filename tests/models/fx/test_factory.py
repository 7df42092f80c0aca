"""From architecture text to a float network, and who may let code run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.checkpoint import load_model, save_model
from robustq.errors import ModelFileError, UsageError
from robustq.models.fx.factory import check_permission, float_network, is_custom, runs_user_code, torchvision_names
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model

SPEC = ModelSpec("torchvision:squeezenet1_1", 32, 32, 4, 3, 32, "cifar10", None, ("a", "b", "c", "d"))

CODE = """
import torch
from pathlib import Path
from torch import nn

Path("imported").write_text("yes")


class Net(nn.Module):
    def __init__(self, width=4, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.inner = nn.Conv2d(width, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.inner(torch.relu(self.conv(x)))).mean((2, 3)))


def ten():
    return Net()


def raises():
    raise ValueError("no luck")


def number():
    return 7


def wrapped():
    return nn.DataParallel(torch.compile(Net()))


def scripted():
    return torch.jit.script(Net())


class Nets:
    small = Net


instance = Net()
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, under a name that no other test imports."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def test_names() -> None:
    assert is_custom("torchvision:resnet18") and is_custom("nets:build") and not is_custom("resnet18")
    assert [runs_user_code(name) for name in ("nets:build", "torchvision:resnet18", "resnet20")] == [True, False, False]
    assert {"resnet18", "resnet34", "mobilenet_v2", "vgg11_bn"} <= set(torchvision_names())
    assert not any("fasterrcnn" in name or "deeplab" in name for name in torchvision_names())
    for architecture, named in (("resnet20", None), ("torchvision:resnet18", None), ("nets:build", "nets:build")):
        check_permission(architecture, named)
    labels = {"torchvision:mobilenet_v2": "mobilenet_v2-w4a4", "pkg.nets:build": "pkg.nets.build-w4a4"}
    for architecture, label in labels.items():
        assert replace(SPEC, architecture=architecture, weight_bits=4, act_bits=4).label == label


@pytest.mark.parametrize("name", ["mobilenet_v2", "googlenet"])
def test_torchvision(name: str) -> None:
    with torch.device("meta"):  # shapes alone: nothing is filled with random numbers
        network = float_network(f"torchvision:{name}", classes=7)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes["classifier.1.weight" if name == "mobilenet_v2" else "fc.weight"][0] == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "torchvision has no classifier 'resnet81'; nearest: resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier 'fasterrcnn_resnet50_fpn'"),
        (":build", "':build' is not module:function"),
        ("../nets:build", "is not module:function"),
        ("no_such_module_anywhere:build", "no module 'no_such_module_anywhere' in the current folder"),
        ("json:loadz", "json has no 'loadz'; nearest: load"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        float_network(name, classes=2)


def test_the_current_folder_is_importable(own_code: str) -> None:
    path = list(sys.path)
    network = float_network(f"{own_code}:Net", classes=6)
    assert network.state_dict()["fc.weight"].shape == (6, 4), "num_classes= is passed"
    assert float_network(f"{own_code}:ten", classes=6).state_dict()["fc.weight"].shape == (10, 4)
    assert isinstance(float_network(f"{own_code}:Nets.small", classes=6), nn.Module)
    assert type(float_network(f"{own_code}:wrapped", classes=6)).__name__ == "Net"
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"raised ValueError: no luck \(.*\.py:25\)"),
        ("scripted", "returned a TorchScript module"),
        ("number", "returned a int; it must return a torch.nn.Module"),
        ("instance", "is a Net, not a function or class"),
        ("tenn", "has no 'tenn'; nearest: ten"),
    ],
)
def test_functions_that_give_no_network(own_code: str, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        float_network(f"{own_code}:{function}", classes=10)


def test_a_module_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken_on_import_here.py").write_text("import no_such_library_here\n", encoding="utf-8")
    with pytest.raises(UsageError, match="needs the module 'no_such_library_here', which is not installed"):
        float_network("broken_on_import_here:build", classes=2)
    Path("syntax_error_here.py").write_text("def build(:\n", encoding="utf-8")
    with pytest.raises(UsageError, match="importing it raised SyntaxError"):
        float_network("syntax_error_here:build", classes=2)


def test_a_file_decides_over_no_code(own_code: str, tmp_path: Path) -> None:
    """Neither building nor loading imports the module unless the user named it."""
    architecture = f"{own_code}:Net"
    spec = replace(SPEC, architecture=architecture, image_size=8)
    with pytest.raises(
        ModelFileError, match=f"was built by {architecture}; add --model {architecture} to run that code"
    ):
        build_model(spec)
    assert not Path("imported").exists() and own_code not in sys.modules
    with pytest.raises(UsageError, match=f"--model other:code was given, but the file holds a {architecture}"):
        build_model(spec, custom_model="other:code")
    assert not Path("imported").exists()
    model = build_model(spec, custom_model=architecture)
    assert Path("imported").exists()
    save_model(tmp_path / "model.pt", model, spec)
    with pytest.raises(ModelFileError, match=f"model.pt: was built by {architecture}; add --model {architecture}"):
        load_model(tmp_path / "model.pt")
    loaded, found, _ = load_model(tmp_path / "model.pt", custom_model=architecture)
    assert found == spec
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_named_model_must_be_the_files(tmp_path: Path) -> None:
    spec = replace(SPEC, architecture="resnet8", image_size=8)
    save_model(tmp_path / "model.pt", build_model(spec), spec)
    with pytest.raises(ModelFileError, match="--model nets:build was given, but the file holds a resnet8"):
        load_model(tmp_path / "model.pt", custom_model="nets:build")


def test_single_layers_have_widths_of_their_own(own_code: str) -> None:
    layer_bits = (("conv", 4), ("fc", 2), ("relu", 8))
    spec = replace(SPEC, architecture=f"{own_code}:Net", weight_bits=3, act_bits=3, layer_bits=layer_bits)
    model: Any = build_model(spec, custom_model=spec.architecture)
    folded: Any = fold(model, spec)
    for network in (model, folded):
        layers = [network.get_submodule(name) for name in ("conv", "inner", "fc")]
        assert [int(layer.weight_quant.bit_width()) for layer in layers] == [4, 3, 2]
        assert [int(network.get_submodule(name).act_quant.bit_width()) for name in ("relu", "relu_1")] == [8, 3]
