"""One bit in the terms of QCDQ: the same network, without a binary quantizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import nn

from robustq.errors import ExportError
from robustq.export.signs_in_qcdq import signs_in_qcdq
from robustq.models.quant.binary import BinaryActQuant
from robustq.models.quant.folding import fold
from tests.export.exported import net
from tests.models.small_nets import perturbed, small_spec


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 1), (1, 4), (3, 1)])
def test_the_same_logits_bit_for_bit(weight_bits: int, act_bits: int) -> None:
    spec = dataclasses.replace(small_spec(4), weight_bits=weight_bits, act_bits=act_bits, layer_bits=(("fc", 1),))
    folded = fold(perturbed(spec), spec)
    said = signs_in_qcdq(folded)
    x = net(8).x[:40]
    assert torch.equal(said(x), folded(x))
    proxies = [getattr(module, kind, None) for module in said.modules() for kind in ("weight_quant", "act_quant")]
    widths = {int(proxy.bit_width()) for proxy in proxies if proxy is not None and proxy.is_quant_enabled}
    assert 1 not in widths and 2 in widths
    # And the given network keeps its quantizers.
    layers: list[Any] = [module for module in folded.modules() if hasattr(module, "weight_quant")]
    assert any(int(layer.weight_quant.bit_width()) == 1 for layer in layers)


def test_a_network_without_signs_is_itself() -> None:
    assert signs_in_qcdq(net(4).folded) is net(4).folded


def test_a_sign_of_anything_else_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), qnn.QuantIdentity(act_quant=BinaryActQuant))
    with pytest.raises(ExportError, match="is the sign of no thresholds; QCDQ cannot say it"):
        signs_in_qcdq(network)
