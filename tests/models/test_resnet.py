"""The networks: names, counts and widths, and 32-bit answers equal to a plain functional network bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock as TorchvisionBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

from robustq.checkpoint import describe_state_dict
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model
from robustq.models.state_dict import find_state_dicts, with_usual_names
from tests.models.small_nets import perturb_batch_norm, small_spec

BLOCKS = {"resnet8": 1, "resnet20": 3}


def test_resnet20_has_the_size_that_is_published_for_option_b() -> None:
    model = build_model(small_spec(32, architecture="resnet20", channels=3))
    assert sum(parameter.numel() for parameter in model.parameters()) == 272_474


@pytest.mark.parametrize("architecture", BLOCKS)
def test_names_are_torchvisions(architecture: str) -> None:
    blocks = BLOCKS[architecture]
    theirs = TorchvisionResNet(TorchvisionBlock, [blocks, blocks, blocks, 1]).state_dict()
    ours = build_model(small_spec(32, architecture=architecture)).state_dict()
    assert set(ours) == {name for name in theirs if not name.startswith("layer4.")}


def functional_logits(state: dict[str, Tensor], x: Tensor, *, blocks: int) -> Tensor:
    """The float network from its weights, without any module of robustq; without projections that of option A."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = norm(conv(x, "conv1"), "bn1").relu()
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            out = norm(conv(out, f"{name}.conv2"), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            elif stride == 2:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))
            x = (out + x).relu()
    x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return functional.linear(x, state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("architecture", "blocks", "count"), [("resnet8", 1, 9), ("resnet20", 3, 21), ("resnet20-a", 3, 19)]
)
@pytest.mark.parametrize(("channels", "image_size"), [(1, 8), (3, 16)])
def test_float_answers_are_a_plain_networks_bit_for_bit(
    architecture: str, blocks: int, count: int, channels: int, image_size: int
) -> None:
    torch.manual_seed(0)
    model = build_model(small_spec(32, architecture=architecture, channels=channels, image_size=image_size))
    perturb_batch_norm(model, seed=0)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == count
    x = torch.rand(4, channels, image_size, image_size)
    with torch.no_grad():
        expected = functional_logits(model.state_dict(), x, blocks=blocks)
        assert torch.equal(model(x), expected)  # exact: the same operations in the same order
    assert expected.std() > 1e-3


def test_first_and_last_layer_and_every_branch_are_8_bit() -> None:
    model = build_model(small_spec(3))
    weight_bits = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight_bits[name] = int(module.quant_weight().bit_width)  # type: ignore[operator]
    assert weight_bits.pop("conv1") == weight_bits.pop("fc") == 8
    assert set(weight_bits.values()) == {3} and len(weight_bits) == 8
    act_bits = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("QuantIdentity", "QuantReLU"):
            act_bits[name] = int(module.act_quant.bit_width())
    eight = {"pixels", "pooled", *(name for name in act_bits if "branch" in name or "downsample" in name)}
    assert len(eight) == 2 + 3 + 2
    assert {name: bits for name, bits in act_bits.items() if bits != 3} == dict.fromkeys(eight, 8)


# --- other architectures ---------------------------------------------------------------------------------------------


def test_resnet18_is_torchvisions_bit_for_bit() -> None:
    torch.manual_seed(0)
    theirs = resnet18(num_classes=10).eval()
    perturb_batch_norm(theirs, seed=0)
    ours = build_model(ModelSpec("resnet18", 32, 32, 10, 3, 64, "imagenet", None, ()))
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))  # exact: the same operations in the same order


def test_a_folded_padded_shortcut_is_the_same_tensor() -> None:
    """Slices and zero channels, written as the convolution that integer kernels can run."""
    torch.manual_seed(0)
    model, spec = build_model(small_spec(4, architecture="resnet20-a")), small_spec(4, architecture="resnet20-a")
    perturb_batch_norm(model, seed=0)
    calibrate(model, torch.rand(16, 1, 8, 8))
    folded = fold(model, spec)
    x = folded.get_submodule("layer1.2.relu2")(torch.rand(2, 16, 6, 6))  # whose codes it counts
    plain, convolved = (net.get_submodule("layer2.0.downsample.0") for net in (model, folded))
    assert isinstance(convolved, nn.Conv2d)
    with torch.no_grad():
        values = convolved(x)
        assert torch.equal(getattr(values, "value", values), plain(x))


@pytest.mark.parametrize("architecture", ["resnet20", "resnet20-a"])
def test_checkpoints_with_other_names_are_recognised(tmp_path: Path, architecture: str) -> None:
    """Scripts for CIFAR call the classifier ``linear`` and projections ``shortcut``, and wrap networks."""
    state = build_model(small_spec(32, architecture=architecture, channels=3)).state_dict()
    renamed = {name.replace("downsample", "shortcut").replace("fc.", "linear."): v for name, v in state.items()}
    for theirs in (renamed, {"state_dict": {f"module.{name}": v for name, v in renamed.items()}, "best_prec1": 91.7}):
        (found,) = map(with_usual_names, find_state_dicts(theirs).values())
        assert found.keys() == state.keys()
        assert describe_state_dict(found, tmp_path) == (architecture, 10, 3)
