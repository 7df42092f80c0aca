"""State dicts: reading, names, and what the layers of a network are.

Weights as people save them: a bare state dict, inside a training checkpoint, or with the prefix of a wrapper.

What the layers of a network are made of, read from the network itself.

Which layer of a network the features enter that ODG-Q aligns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robustq.models.quant.quantizers import FLOAT_BITS

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys below which training scripts keep the weights, beside the optimiser and the epoch."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Put before every name by DataParallel, torch.compile, and by a module that holds the network as a member."""

ALIASES = {"linear.": "fc.", "shortcut.": "downsample."}
"""What ResNets for CIFAR call these layers where torchvision says the second."""


def is_bare_state_dict(content: Any) -> bool:
    """Whether ``content`` is what ``torch.save(model.state_dict())`` writes."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def find_state_dict(content: Any) -> dict[str, Tensor] | None:
    """The weights in ``content`` under the network's own names; None where there are none.

    Args:
        content: a state dict, a module, or a dict that holds one of them under a name of :data:`WRAPPERS`.
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
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) and name != prefix for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                stripped = True
    return state


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's names in place of :data:`ALIASES`; a network that has both keeps its own."""
    for alias, name in ALIASES.items():
        if any(name in own for own in state):
            continue
        state = {own.replace(alias, name) if _has(own, alias) else own: value for own, value in state.items()}
    return state


def _has(name: str, part: str) -> bool:
    return name.startswith(part) or f".{part}" in name


def describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One row per convolution and linear layer, in order: ``name kind shape weight_bits``."""
    return [
        {
            "name": name,
            "kind": "conv" if isinstance(layer, nn.Conv2d) else "linear",
            "shape": list(layer.weight.shape),
            "weight_bits": weight_bits(layer),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def weight_bits(layer: nn.Module) -> int:
    """Width of a layer's weights; 32 where nothing quantizes them."""
    quantizer: Any = getattr(layer, "weight_quant", None)
    if quantizer is None or not quantizer.is_quant_enabled:
        return FLOAT_BITS
    return int(quantizer.bit_width())


FEATURE_LAYER = "feature_layer"
"""Where the graph of a user's own network says it, in ``meta``."""

_OURS = "avgpool"
"""Its name in the networks of this project, as in torchvision's ResNets."""


def feature_layer_of(model: nn.Module) -> str | None:
    """The name of the layer that the features of ``model`` enter, or None where nobody knows one."""
    # Asked of ``meta`` and not of the class: Brevitas' graphs load sympy, which takes as long as torch.
    meta = getattr(model, "meta", None)
    if isinstance(meta, dict) and FEATURE_LAYER in meta:
        found: str | None = meta[FEATURE_LAYER]
        return found
    return _OURS if _OURS in dict(model.named_modules()) else None
