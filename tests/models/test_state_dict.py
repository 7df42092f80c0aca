"""Weights of checkpoints as training scripts save them: which are taken, and under which names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import robustq
from robustq import progress
from robustq.checkpoint import describe_state_dict, save_model
from robustq.errors import ModelFileError, UsageError
from robustq.models.spec import build_model
from robustq.models.state_dict import find_state_dicts, with_names_of, with_usual_names
from robustq.torch_file import read_checkpoint
from robustq.workflow.setup import open_source
from tests.models.small_nets import small_spec


@pytest.fixture
def notes_are_shown() -> Iterator[None]:
    progress.show(True)
    yield
    progress.show(False)


class Wrapped(nn.Module):
    """Its only attribute has a name that wrappers use too; the layers' names are aliases of torchvision's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        layers = {"conv": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "linear": nn.Linear(4, 2)}
        self.add_module(name, nn.ModuleDict(layers))


def as_saved(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A state dict of ``net`` as tools save it, by the tool."""
    plain = dict(net.state_dict())
    averaged = dict(AveragedModel(net).state_dict())
    return {
        "itself": plain,
        "DataParallel": dict(nn.DataParallel(net).state_dict()),
        "torch.compile": {f"_orig_mod.{name}": value for name, value in plain.items()},
        "Lightning": {f"model.{name}": value for name, value in plain.items()} | {"loss.weight": torch.ones(2)},
        "AveragedModel": averaged,
        "thop": {**plain, "total_ops": torch.zeros(1), "a.total_params": torch.zeros(1)},
        "torch before 0.4.1": {name: value for name, value in plain.items() if "num_batches" not in name},
    }


@pytest.mark.parametrize("tool", as_saved(Wrapped("net")))
@pytest.mark.parametrize("name", ["net", "model", "network", "module", "body"])
def test_names_become_those_of_the_users_network(name: str, tool: str) -> None:
    net = Wrapped(name)
    found = with_names_of(net, as_saved(net)[tool])
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("tool", as_saved(Wrapped("net")))
def test_known_architectures_are_found_under_the_names_of_tools(tool: str) -> None:
    net = build_model(small_spec(32))
    state = with_usual_names(as_saved(net)[tool])
    assert describe_state_dict(state, Path("weights.pt")) == ("resnet8", 10, 1)
    assert with_names_of(net, state).keys() == net.state_dict().keys()


@pytest.mark.usefixtures("notes_are_shown")
def test_the_first_set_of_weights_is_taken_and_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, averaged = ({k: v + seed for k, v in build_model(small_spec(32)).state_dict().items()} for seed in (0, 1))
    path = tmp_path / "timm.pt"
    torch.save({"epoch": 3, "state_dict_ema": averaged, "state_dict": plain}, path)
    assert list(find_state_dicts(read_checkpoint(path))) == ["state_dict", "state_dict_ema"]
    for wanted, expected in ((None, plain), ("state_dict_ema", averaged)):
        state = open_source(path, "digits", weights=wanted).state
        assert torch.equal(state["conv1.weight"], expected["conv1.weight"])
    told = capsys.readouterr().err
    assert told.count("weights state_dict of timm.pt; the file holds others too: --weights state_dict_ema") == 1
    with pytest.raises(UsageError, match=r"--weights ema: .*timm.pt holds state_dict, state_dict_ema"):
        open_source(path, "digits", weights="ema")


def test_weights_are_found_under_unusual_keys_too() -> None:
    state = dict(build_model(small_spec(32)).state_dict())
    content = {"metrics": {"acc": torch.ones(1)}, "params_ema": state, "generator": state, "model": state}
    assert list(find_state_dicts(content)) == ["model", "params_ema", "generator"]
    assert find_state_dicts({"format": "robustq-resume", "weights": state}) == {}


def test_harmless_values_beside_the_weights_are_read(tmp_path: Path) -> None:
    beside: dict[str, Any] = {
        "best_acc": np.float64(0.9),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "path": Path("runs/a"),
    }
    state = dict(build_model(small_spec(32)).state_dict())
    torch.save({"state_dict": state, **beside}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert (found["best_acc"], found["args"], found["path"]) == (0.9, beside["args"], beside["path"])
    assert find_state_dicts(found)["state_dict"].keys() == state.keys()


@pytest.mark.usefixtures("notes_are_shown")
def test_half_precision_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model(small_spec(32)).half().state_dict(), tmp_path / "half.pt")
    open_source(tmp_path / "half.pt", "digits")
    assert "weights float16 in half.pt; float32 from here on" in capsys.readouterr().err


def test_a_negative_variance_is_refused(tmp_path: Path) -> None:
    net = build_model(small_spec(32))
    net.state_dict()["bn1.running_var"][1] = -0.1
    save_model(tmp_path / "own.pt", net, small_spec(32))
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    for name in ("own.pt", "bare.pt"):
        with pytest.raises(ModelFileError, match=r"bn1\.running_var holds a negative variance"):
            robustq.harden_model(tmp_path / name, bits=4, data="digits")
