"""The functions of the package: their help, paths and radii as text, and modules in place of files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustq
from robustq.checkpoint import load_model
from robustq.data import load_dataset
from robustq.errors import UsageError
from robustq.models.spec import build_model
from tests.models.small_nets import small_spec

FAST = ("epochs=1", "train_images=64", "monitor_images=16", "calibration_images=32")


@pytest.mark.parametrize("name", robustq.__all__)
def test_the_help_of_each_function_is_whole(name: str) -> None:
    function = getattr(robustq, name)
    text = inspect.getdoc(function) or ""
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    explained = {
        word for names in re.findall(r"^    ([a-z_, ]+): ", arguments, re.MULTILINE) for word in names.split(", ")
    }
    assert explained == set(inspect.signature(function).parameters)
    assert "Raises:" in text and "Returns:" in text and ":func:" not in text and "as :" not in text
    assert "RobustqError" not in text  # the kinds of errors are named


def test_paths_and_radii_may_be_text(digits_float: Path, tmp_path: Path) -> None:
    (tmp_path / "bits.toml").write_text('"layer1.0.conv1" = 8\n')
    made = robustq.harden_model(
        str(digits_float),
        bits=4,
        bits_per_layer=str(tmp_path / "bits.toml"),
        epsilon="12/255",
        overrides=FAST,
        out=str(tmp_path / "run"),
    )
    assert made.epsilon == 12 / 255 and dict(load_model(made.checkpoint)[1].layer_bits) == {"layer1.0.conv1": 8}
    saved = str(tmp_path / "found.npz")
    found = robustq.attack_model(made.checkpoint, suite="recheck", images=4, epsilon="0.1", save_adversarial=saved)
    assert found["epsilon"] == 0.1 and found.adversarial == Path(saved)
    with pytest.raises(UsageError, match="epsilon '8/0' is not a number"):
        robustq.attack_model(made.checkpoint, epsilon="8/0")


class Normalised(nn.Module):
    """A network of the caller whose builder nobody knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner((x - 0.5) / 0.25)
        return answer


def test_a_module_is_hardened_and_attacked_in_place_of_a_file(digits_float: Path, tmp_path: Path) -> None:
    network = load_model(digits_float)[0].train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made, same = (
        robustq.harden_model(source, bits=8, recipe="ptq", data="digits", out=tmp_path / name)
        for source, name in ((network, "module"), (digits_float, "file"))
    )
    weights, expected = (load_model(one.checkpoint)[0].state_dict() for one in (made, same))
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    foreign = Normalised(build_model(small_spec(32)))
    found = robustq.attack_model(foreign, data="digits", suite="recheck", images=20, epsilon=8 / 255)
    images, labels = load_dataset("digits").test.take(20)
    with torch.no_grad():
        right = int((foreign.eval()(images / 255.0).argmax(dim=1) == labels).sum())
    assert found["clean_accuracy"] == right / 20 and found["label"] == "Normalised-float"
    assert all(value.requires_grad for value in foreign.parameters())


def test_modules_that_cannot_be_taken_are_one_line(
    digits_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = load_model(digits_float)[0]
    with pytest.raises(UsageError, match=r"Normalised: is none of robustq's networks, .* add custom_model="):
        robustq.harden_model(Normalised(network), bits=4, data="digits")
    own_forward = load_model(digits_float)[0]
    own_forward.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(UsageError, match="answers otherwise than resnet8 with its weights"):
        robustq.harden_model(own_forward, bits=4, data="digits")
    with pytest.raises(UsageError, match="ResNet: a module does not name its data"):
        robustq.attack_model(network)
    with pytest.raises(UsageError, match=r"ResNet: a module cannot be exported as it is; quantize it first"):
        robustq.export_model(network)
    assert list(tmp_path.iterdir()) == []
