"""Binary networks for QCDQ: the same logits, without a binary quantizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import nn

from robustq.errors import ExportError
from robustq.export.binary_qcdq import without_binary_quantizers
from robustq.models.quant.binary import BinaryActQuant
from robustq.models.quant.folding import fold
from tests.export.exported import net
from tests.models.small_nets import perturbed, small_spec


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 1), (1, 4), (3, 1)])
def test_the_same_logits_bit_for_bit(weight_bits: int, act_bits: int) -> None:
    spec = dataclasses.replace(small_spec(4), weight_bits=weight_bits, act_bits=act_bits, layer_bits=(("fc", 1),))
    folded = fold(perturbed(spec), spec)
    twin = without_binary_quantizers(folded)
    x = net(8).x[:40]
    assert torch.equal(twin(x), folded(x))
    proxies = [getattr(module, kind, None) for module in twin.modules() for kind in ("weight_quant", "act_quant")]
    widths = {int(proxy.bit_width()) for proxy in proxies if proxy is not None and proxy.is_quant_enabled}
    assert 1 not in widths and 2 in widths
    # And the given network keeps its quantizers.
    layers: list[Any] = [module for module in folded.modules() if hasattr(module, "weight_quant")]
    assert any(int(layer.weight_quant.bit_width()) == 1 for layer in layers)


def test_other_networks_stay_themselves() -> None:
    assert without_binary_quantizers(net(4).folded) is net(4).folded


def test_binary_activations_without_thresholds_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), qnn.QuantIdentity(act_quant=BinaryActQuant))
    with pytest.raises(ExportError, match="has no thresholds in front of it; QCDQ cannot hold it"):
        without_binary_quantizers(network)
