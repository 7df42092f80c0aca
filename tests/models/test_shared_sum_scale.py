"""shared_sum_scale: one quantizer for both inputs of each residual sum, in our networks and in custom networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.errors import UsageError
from robustq.export.formats import build
from robustq.export.integer_layers import optimised_layers
from robustq.export.parity import bound_of, parity
from robustq.models.fx.build import quantized_graph
from robustq.models.quant.calibration import best_threshold, calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import Widths
from robustq.models.spec import ModelSpec, build_model
from tests.export import hand_made as hm
from tests.models.small_nets import digits, perturb_batch_norm, small_spec


def shared_spec(bits: int, *, architecture: str = "resnet8") -> ModelSpec:
    return dataclasses.replace(small_spec(bits, architecture=architecture), shared_sum_scale=True)


def network(spec: ModelSpec) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(spec)
    perturb_batch_norm(model, seed=0)
    calibrate(model, to_float(digits()[0][:40]))
    for name, parameter in model.named_parameters():  # calibrated thresholds lie on each other's rounding ties
        if name.endswith("log_threshold"):
            parameter.data += 0.01 * torch.randn(())
    return model.eval()


def scales_of_sums(model: onnx.ModelProto) -> list[list[float]]:
    """The scales that the two inputs of each Add count in."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    place = {"DequantizeLinear": 1, "Quant": 1}
    found = []
    for node in model.graph.node:
        sources = [made_by.get(name) for name in node.input]
        if node.op_type == "Add" and all(source is not None and source.op_type in place for source in sources):
            found.append([float(hm.constant(model, source.input[1])) for source in sources if source is not None])
    return found


@pytest.mark.parametrize(
    ("architecture", "sums", "format_name"),
    [("resnet8", 3, "qonnx"), ("resnet8", 3, "integer"), ("resnet20-a", 9, "integer")],
)
def test_the_inputs_of_each_sum_have_one_scale(architecture: str, sums: int, format_name: str) -> None:
    spec = shared_spec(4, architecture=architecture)
    scales = scales_of_sums(build(format_name, fold(network(spec), spec), spec))
    assert len(scales) == sums
    assert all(one == other for one, other in scales)
    assert len({one for one, _ in scales}) == sums  # each sum has a scale of its own


@pytest.mark.parametrize("bits", [8, 2])
def test_files_keep_every_answer_and_run_as_integers(tmp_path: Path, bits: int) -> None:
    spec = shared_spec(bits)
    folded, x = fold(network(spec), spec), to_float(digits()[0][:100])
    path = tmp_path / "net.onnx"
    onnx.save(build("integer", folded, spec), path)
    for agreement in parity(path, folded, x, runs=("optimised", "unoptimised"), bound=bound_of(spec)).values():
        assert agreement.different_top1 == 0 and agreement.holds
    assert optimised_layers(path).in_float == ()


class Residual(nn.Module):
    """An identity shortcut, a shortcut with a layer, and a sum of two sums, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        first = (x + self.norms[0](self.inner[0](x))).relu()
        second = torch.add(self.norms[1](self.inner[1](first)), self.norms[2](self.inner[2](first)))
        third = second + first
        logits: Tensor = self.fc((third + self.norms[3](self.inner[3](first))).relu().mean((2, 3)))
        return logits


def test_a_custom_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: Any = {"name": "net", "widths": Widths(4, 4), "classes": 10, "channels": 1, "image_size": 8}
    graph = quantized_graph(Residual(), shared_sum_scale=True, **options)
    perturb_batch_norm(graph, seed=0)
    x = to_float(digits()[0][:40])
    calibrate(graph, x)
    spec = dataclasses.replace(small_spec(4), architecture="net:Residual", shared_sum_scale=True)
    folded = fold(graph, spec)
    model = build("integer", folded, spec)
    scales = scales_of_sums(model)
    assert len(scales) == 4 and all(one == other for one, other in scales)
    onnx.save(model, tmp_path / "net.onnx")
    (agreement,) = parity(tmp_path / "net.onnx", folded, x, runs=("unoptimised",), bound=1e-4).values()
    assert agreement.different_top1 == 0 and agreement.holds


def test_calibration_takes_both_inputs() -> None:
    """The threshold is the best one for the values of the branch and of the shortcut together."""
    spec = shared_spec(4)
    torch.manual_seed(0)
    model = build_model(spec)
    x = to_float(digits()[0][:40])
    calibrate(model, x)
    branch: Any = model.get_submodule("layer1.0.branch")
    entered: list[Tensor] = []
    branch.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].flatten()))
    with torch.no_grad():
        model(x)
    assert len(entered) == 2
    threshold = branch.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.log_threshold.exp().item()
    assert threshold == pytest.approx(best_threshold(torch.cat(entered), bit_width=8, signed=True).item(), rel=1e-6)


def test_a_spec_keeps_it_and_one_bit_refuses_it() -> None:
    spec = shared_spec(4)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    older = {key: value for key, value in spec.to_dict().items() if key != "shared_sum_scale"}
    assert not ModelSpec.from_dict(older).shared_sum_scale
    with pytest.raises(UsageError, match=r"^1 bit has no blocks with shared_sum_scale; set it to false"):
        build_model(shared_spec(1))
