"""State dicts as training scripts save them, and facts read from a network: its layers and its feature layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from robustq.models.quant.quantizers import FLOAT_BITS

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys of training checkpoints that hold the weights."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes of every name by DataParallel, torch.compile, and modules that hold the network as a member."""

ALIASES = {"linear.": "fc.", "shortcut.": "downsample."}
"""Layer names of ResNets for CIFAR -> torchvision's."""

FEATURE_LAYER = "feature_layer"
"""Key of the feature layer in the ``meta`` of a custom network's graph."""

OUR_FEATURE_LAYER = "avgpool"
"""The feature layer of robustq's networks, and of torchvision's ResNets."""


def is_bare_state_dict(content: Any) -> bool:
    """Whether ``content`` is what ``torch.save(model.state_dict())`` writes."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def find_state_dict(content: Any) -> dict[str, Tensor] | None:
    """The weights under torchvision's names, without prefixes; None when there are none.

    ``content`` is a state dict, a module, or a dict that holds one of them under a name of :data:`WRAPPERS`.
    """
    # Two levels are enough for {"model": {"state_dict": ...}}, and a dict that holds itself ends too.
    for _ in range(2):
        if isinstance(content, dict) and not is_bare_state_dict(content):
            inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict | nn.Module)]
            content = inner[0] if inner else content
    if isinstance(content, nn.Module):
        content = content.state_dict()
    return _renamed(_without_prefixes(dict(content))) if is_bare_state_dict(content) else None


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def shared(prefix: str) -> bool:
        return all(name.startswith(prefix) and name != prefix for name in state)

    while prefix := next(filter(shared, PREFIXES), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's names in place of :data:`ALIASES`; a network with both kinds of names stays as it is."""
    for alias, name in ALIASES.items():
        if not any(name in own for own in state):
            state = {
                own.replace(alias, name) if f".{alias}" in f".{own}" else own: value for own, value in state.items()
            }
    return state


@dataclass(frozen=True)
class LayerInfo:
    """A convolution (``kind`` conv) or linear layer (linear): its weight's shape and bit width."""

    name: str
    kind: str
    shape: list[int]
    weight_bits: int

    def to_dict(self) -> dict[str, Any]:
        """A row of ``robustq info --json``."""
        return asdict(self)


def describe_layers(model: nn.Module) -> list[LayerInfo]:
    """Every convolution and linear layer of ``model``, in order."""
    return [
        LayerInfo(
            name, "conv" if isinstance(layer, nn.Conv2d) else "linear", list(layer.weight.shape), weight_bits(layer)
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def weight_bits(layer: nn.Module) -> int:
    """Width of a layer's weights; 32 without a quantizer."""
    quantizer: Any = getattr(layer, "weight_quant", None)
    if quantizer is None or not quantizer.is_quant_enabled:
        return FLOAT_BITS
    return int(quantizer.bit_width())


def feature_layer_of(model: nn.Module) -> str | None:
    """The name of the layer whose input is the features that ODG-Q aligns, or None when it is unknown."""
    # Read from ``meta``, not from the class: Brevitas' graphs load sympy, which takes as long as torch.
    meta = getattr(model, "meta", None)
    if isinstance(meta, dict) and FEATURE_LAYER in meta:
        found: str | None = meta[FEATURE_LAYER]
        return found
    return OUR_FEATURE_LAYER if OUR_FEATURE_LAYER in dict(model.named_modules()) else None
