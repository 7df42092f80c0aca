"""Layers that a network computes by functions on its own tensors, made modules.

timm's fused norm layers call ``functional.batch_norm``, its linear layers ``functional.linear``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node, Tracer
from brevitas.graph.utils import set_module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from robustq.errors import UsageError
from robustq.models.fx.trace import call_arguments, describe, replace_call


def own_layers_to_modules(model: GraphModule, network: nn.Module) -> None:
    """Replace functions on tensors of one module of ``network`` by a layer in the place of that module.

    Modules inside it, such as an activation function, keep their names, and so do all tensors. See
    :func:`norm_to_module` and :func:`layer_to_module`.
    """
    for node in list(model.graph.nodes):
        if node.target is functional.batch_norm:
            norm_to_module(model, node, network)
        elif node.target in LAYERS:
            layer_to_module(model, node, network)
    model.meta["unused_entries"] = tuple(sorted(set(model.meta["unused_entries"]) - set(model.state_dict())))
    model.recompile()


TENSORS = ("running_mean", "running_var", "weight", "bias")
"""Arguments of ``functional.batch_norm`` behind the first, and what BatchNorm2d calls them."""


class OwnNorm(nn.BatchNorm2d):
    """BatchNorm of a user's module: its tensors keep the names that they have there.

    Args:
        names: of the tensors in the state dict, by their name here.
        frozen: use the running statistics in training too.
    """

    def __init__(self, channels: int, *, eps: float, momentum: float | None, names: dict[str, str], frozen: bool):
        super().__init__(channels, eps, momentum, affine=False)
        self.names, self.frozen = names, frozen

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes, as ``functional.batch_norm`` takes."""

    def train(self, mode: bool = True) -> OwnNorm:
        """Frozen statistics stay in eval mode."""
        super().train(mode)
        self.training = mode and not self.frozen
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        destination.update({self._renamed(key, prefix, self.names): value for key, value in own.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        own = {name: key for key, name in self.names.items()}
        renamed = {self._renamed(key, prefix, own): value for key, value in state_dict.items()}
        # Not BatchNorm2d's, which adds a counter of batches that this one may not have.
        nn.Module._load_from_state_dict(self, renamed, prefix, *rest)

    @staticmethod
    def _renamed(key: str, prefix: str, names: dict[str, str]) -> str:
        name = key.removeprefix(prefix)
        return prefix + names.get(name, name) if key.startswith(prefix) else key


def norm_to_module(model: GraphModule, node: Node, network: nn.Module) -> None:
    """Replace a call of ``functional.batch_norm`` by an :class:`OwnNorm`.

    It follows the mode of the network, unless the user's call does not. UsageError names a call with statistics of the
    batch, with tensors of several modules or of none, or a module that makes two calls.
    """
    arguments = _norm_arguments(node)
    places = {key: str(arguments[key].target) for key in TENSORS if isinstance(arguments.get(key), Node)}
    owners = {place.rpartition(".")[0] for place in places.values()}
    if not {"running_mean", "running_var"} <= places.keys() or arguments.get("training", False):
        raise UsageError(f"{describe(model, node)} uses statistics of the batch in eval mode; keep running ones")
    if len(owners) != 1 or owners == {""} or any(arguments[key].all_input_nodes for key in places):
        raise UsageError(
            f"{describe(model, node)} computes on tensors of no single module; give each BatchNorm a module, such as "
            "nn.BatchNorm2d"
        )
    (owner,) = owners
    own, graph_own = network.get_submodule(owner), model.get_submodule(owner)
    if isinstance(graph_own, OwnNorm):
        raise UsageError(f"{describe(model, node)} is the second call of '{owner}'; give it a module of its own")
    tensors = {key: getattr(own, place.rpartition(".")[2]) for key, place in places.items()}
    norm = OwnNorm(
        len(tensors["running_mean"]),
        eps=float(arguments.get("eps", 1e-5)),
        momentum=getattr(own, "momentum", arguments.get("momentum", 0.1)),
        names={key: place.rpartition(".")[2] for key, place in places.items()},
        frozen=not _follows_mode(own),
    )
    _fill(norm, own, tensors)
    for name, child in graph_own.named_children():
        if name not in norm.names.values():
            norm.add_module(name, child)
    replace_call(model, node, owner, _first(node))
    for key in places:
        if not arguments[key].users:
            model.graph.erase_node(arguments[key])
    set_module(model, norm.eval(), owner)


LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.linear: (nn.Linear, ("weight", "bias")),
    functional.conv2d: (nn.Conv2d, ("weight", "bias", "stride", "padding", "dilation", "groups")),
}
"""Functions of layers: their module, and the arguments behind the first."""


def layer_to_module(model: GraphModule, node: Node, network: nn.Module) -> None:
    """Replace ``functional.linear`` or ``functional.conv2d`` on the weight and bias of one such layer by the layer.

    Why: a subclass of a layer with a forward of its own, such as one that pads first, is traced into. Other calls stay.
    """
    layer_type, names = LAYERS[node.target]
    arguments = call_arguments(node, *names)
    weight, bias = arguments.pop("weight"), arguments.pop("bias", None)
    owner = str(weight.target).rpartition(".")[0] if isinstance(weight, Node) and weight.op == "get_attr" else ""
    own = network.get_submodule(owner)
    bias_is_own = str(bias.target) == f"{owner}.bias" if isinstance(bias, Node) else getattr(own, "bias", None) is None
    if not isinstance(own, layer_type) or str(weight.target) != f"{owner}.weight" or not bias_is_own:
        return
    if isinstance(model.get_submodule(owner), layer_type):
        return  # a second call, which is refused for its shared weight
    layer = copy.copy(own)
    layer.__class__ = layer_type
    layer._modules = dict(model.get_submodule(owner)._modules)
    for name, value in arguments.items():
        setattr(layer, name, value if name in ("groups",) or isinstance(value, str) else _pair(value))
    if layer_type is nn.Conv2d:
        setattr(layer, "padding_mode", "zeros")  # noqa: B010
    replace_call(model, node, owner, _first(node))
    for tensor in (weight, bias):
        if isinstance(tensor, Node) and not tensor.users:
            model.graph.erase_node(tensor)
    set_module(model, layer, owner)


def _first(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _fill(norm: OwnNorm, own: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give ``norm`` the user's tensors, and the counter of batches if there is one."""
    kept = own.state_dict(keep_vars=True)
    for name, value in tensors.items():
        delattr(norm, name)
        if isinstance(value, nn.Parameter):
            norm.register_parameter(name, value)
        else:
            norm.register_buffer(name, value, persistent=norm.names[name] in kept)
    if tensors.keys() & {"weight", "bias"}:
        norm.affine = True
        for name, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
            if name not in tensors:  # folding takes both or none
                delattr(norm, name)
                norm.register_buffer(name, fill(tensors["running_mean"]), persistent=False)
    norm.num_batches_tracked = kept.get("num_batches_tracked")


def _follows_mode(own: nn.Module) -> bool:
    """Whether a call of ``functional.batch_norm`` in this module uses statistics of the batch in training."""
    try:
        graph = Tracer().trace(copy.deepcopy(own).train())
    except Exception:  # forward of the user that is traced as a part of the network alone
        return True
    calls = [_norm_arguments(node) for node in graph.nodes if node.target is functional.batch_norm]
    return any(call.get("training", False) is not False for call in calls)


def _norm_arguments(node: Node) -> dict[str, Any]:
    return call_arguments(node, *TENSORS, "training", "momentum", "eps")
