"""Convolutions by buffers, such as the blur of anti-aliased pooling, made layers whose weights are not trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import brevitas.nn as qnn
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from robustq.models.fx.trace import Constant, call_arguments, called_module, replace_call


class _Fixed:
    """Mixin: the weight is a buffer, which keeps the entry that it had in the state dict of the user's network."""

    persistent = True

    def fix(self, weight: Tensor, *, persistent: bool) -> Any:
        """Take ``weight`` in place of the parameter; without ``persistent`` the state dict has no entry."""
        layer: Any = self
        layer._parameters.pop("weight", None)
        layer.register_buffer("weight", weight.detach(), persistent=persistent)
        self.persistent = persistent
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self.persistent:
            destination[prefix.removesuffix(".")] = destination.pop(f"{prefix}weight")


class FixedConv2d(_Fixed, nn.Conv2d):
    """A convolution by a buffer; the module stands in the place of the buffer."""


class FixedQuantConv2d(_Fixed, qnn.QuantConv2d):  # type: ignore[misc]
    """The same with quantized weights."""


def buffers_to_convolutions(model: GraphModule) -> None:
    """Replace each ``functional.conv2d`` without bias whose weight is a buffer by a :class:`FixedConv2d`.

    Needs shapes. A buffer of several calls stays.
    """
    for node in list(model.graph.nodes):
        if node.target is not functional.conv2d:
            continue
        arguments = call_arguments(node, "weight", "bias", "stride", "padding", "dilation", "groups")
        weight, padding = arguments["weight"], arguments.get("padding", 0)
        if not isinstance(weight, Node) or len(weight.users) > 1 or arguments.get("bias") is not None:
            continue
        tensor = _buffer(model, weight)
        if tensor is None:
            continue
        source, place = node.all_input_nodes[0], str(weight.target)
        channels = source.meta["shape"][1]
        layer = FixedConv2d(
            channels,
            len(tensor),
            (tensor.shape[2], tensor.shape[3]),
            _pair(arguments.get("stride", 1)),
            padding if isinstance(padding, str) else _pair(padding),
            _pair(arguments.get("dilation", 1)),
            channels // tensor.shape[1],  # a group may be computed from the image's shape
            bias=False,
        ).fix(tensor, persistent=weight.op == "get_attr")
        replace_call(model, node, place, source)
        model.graph.erase_node(weight)
        path, _, last = place.rpartition(".")
        owner = model.get_submodule(path)
        delattr(owner, last)
        set_module(model, layer.eval(), place)
        if layer.persistent:
            owner.register_load_state_dict_pre_hook(partial(_rename, last))
    model.graph.eliminate_dead_code()
    model.recompile()


def _rename(name: str, owner: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """The entry of a buffer becomes that of the module in its place, which the owner knows."""
    if f"{prefix}{name}" in state_dict:
        state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")


def _buffer(model: GraphModule, node: Node) -> Tensor | None:
    if node.op == "get_attr":
        return dict(model.named_buffers()).get(str(node.target))
    constant = called_module(model, node)
    return constant.value if isinstance(constant, Constant) else None
