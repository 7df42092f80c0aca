"""Networks that attacks use beside the one under attack: made, trained once, kept, and handed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.checkpoint import save_model
from robustq.data import load_dataset, to_float
from robustq.errors import DataError, RunStoppedError
from robustq.evaluation.accuracy import predict
from robustq.models.spec import build_model
from robustq.workflow import surrogates
from robustq.workflow.open_model import OpenedModel, open_attackable
from tests.models.small_nets import small_spec

CPU = torch.device("cpu")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, and training that takes a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(surrogates, "EPOCHS", 1)
    monkeypatch.setattr(surrogates, "IMAGES", 100)
    return tmp_path


def opened(path: Path) -> OpenedModel:
    return open_attackable(path, device=CPU)


def predicted(model: torch.nn.Module) -> torch.Tensor:
    return predict(model, to_float(load_dataset("digits").test.take(200)[0]), batch_size=200)


def test_the_control_is_trained_once_and_kept(cheap: Path, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, data = opened(digits_w4a4).spec, load_dataset("digits")
    (first,) = surrogates.OtherNetworks(data, None, CPU).natural(spec).values()
    (folder,) = (cheap / "runs" / "surrogates").iterdir()
    assert folder.name == f"digits-{data.digest()[:8]}-resnet8-natural-{surrogates.SEED}"

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(surrogates, "train_model", never)
    again = surrogates.OtherNetworks(data, None, CPU).natural(spec)
    assert list(again) == ["a natural resnet8"]
    for one, other in zip(first.state_dict().values(), again["a natural resnet8"].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # It is no defended model that a bare export would ship.
    assert not (cheap / "runs" / "last-hardened").exists()


def test_training_that_was_stopped_goes_on(cheap: Path, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, data = opened(digits_w4a4).spec, load_dataset("digits")

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("robustq.workflow.training_run.restore", stopped)  # after the last epoch, before result.json
        with pytest.raises(RunStoppedError, match=r"--resume runs/surrogates"):
            surrogates.OtherNetworks(data, None, CPU).natural(spec)
    (folder,) = (cheap / "runs" / "surrogates").iterdir()
    assert not (folder / "result.json").exists()
    surrogates.OtherNetworks(data, None, CPU).natural(spec)
    assert (folder / "result.json").is_file()


def test_twins_share_the_weights_at_other_widths(digits_w4a4: Path, digits_float: Path) -> None:
    data, model = load_dataset("digits"), opened(digits_w4a4)
    assert model.network is not None
    found = surrogates.OtherNetworks(data, None, CPU).requantized(model)
    assert list(found) == ["its float twin", "its 8-bit twin"]
    for network in found.values():
        assert torch.equal(network.state_dict()["conv1.weight"], model.network.state_dict()["conv1.weight"])
        assert not network.training
    # Eight bits round little of what float computes, four bits more.
    to_eight = (predicted(found["its float twin"]) == predicted(found["its 8-bit twin"])).float().mean()
    to_four = (predicted(found["its float twin"]) == predicted(model.network)).float().mean()
    assert to_eight > 0.9 and to_eight > to_four
    assert surrogates.OtherNetworks(data, None, CPU).requantized(opened(digits_float)) == {}


def test_networks_that_are_handed_in_must_fit(digits_float: Path, tmp_path: Path) -> None:
    data = load_dataset("digits")
    found = surrogates.OtherNetworks(data, None, CPU).load(digits_float)
    assert not found.training and not any(weight.requires_grad for weight in found.parameters())
    spec = small_spec(32, channels=3)
    save_model(tmp_path / "colour.pt", build_model(spec), spec)
    with pytest.raises(DataError, match="3 channels"):
        surrogates.OtherNetworks(data, None, CPU).load(tmp_path / "colour.pt")
