"""The trial export passes a network that can be deployed and refuses one whose file fails or answers otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustq.data import TensorSplit
from robustq.errors import ExportError, UsageError
from robustq.export.formats import build
from robustq.workflow.export_check import check_export, check_file_size
from tests.export.test_custom_networks import spec
from tests.models.fx.custom_nets import folded_of, graph_of, pixels

DATA: Any = SimpleNamespace(train=TensorSplit(pixels(40), torch.arange(40) % 5))


def test_a_file_that_fails_or_is_another_networks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = graph_of("tutorial", 4)
    check_export(network, spec(4), DATA)
    other = folded_of("tutorial", 8)
    monkeypatch.setattr("robustq.workflow.export_check.build", lambda name, _, __: build(name, other, spec(8)))
    with torch.no_grad():
        network.get_submodule("fc3").bias += 10 * torch.arange(5.0)
    with pytest.raises(UsageError, match=r"answers otherwise than in PyTorch .*; --no-checks trains it all the same"):
        check_export(network, spec(4), DATA)

    def fails(*_: Any) -> None:
        raise ExportError("no such operation")

    monkeypatch.setattr("robustq.workflow.export_check.build", fails)
    with pytest.raises(UsageError, match="no such operation; --no-checks"):
        check_export(network, spec(4), DATA)


def test_weights_that_fit_into_no_file() -> None:
    check_file_size({"weight": torch.empty(2**29, device="meta")})
    with pytest.raises(UsageError, match=r"644 million parameters do not fit into an ONNX file of 2 GiB .*--no-checks"):
        check_file_size({"weight": torch.empty(644_000_000, device="meta")})
