"""State dicts as training scripts save them, and facts read from a network: its layers and its feature layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from robustq.models.quant.quantizers import FLOAT_BITS

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
"""Usual keys of the weights in training checkpoints, in the order in which they are taken; averaged ones last."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes of every name by DataParallel, torch.compile, and modules that hold the network as a member."""

COUNTER = "num_batches_tracked"
"""Last part of the names of BatchNorm's counters, which nothing here reads."""

ALIASES = {"linear.": "fc.", "shortcut.": "downsample."}
"""Layer names of ResNets for CIFAR -> torchvision's."""

FEATURE_LAYER = "feature_layer"
"""Key of the feature layer in the ``meta`` of a custom network's graph."""

FLOAT_LAYERS = "float_layers"
"""Key of the names of the layers that stay in float, in the ``meta`` of a quantized graph."""

OUR_FEATURE_LAYER = "avgpool"
"""The feature layer of robustq's networks, and of torchvision's ResNets."""


def is_bare_state_dict(content: Any) -> bool:
    """Whether ``content`` is what ``torch.save(model.state_dict())`` writes."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def find_state_dicts(content: Any) -> dict[str, dict[str, Tensor]]:
    """The sets of weights in a file, by their key in it; of a bare state dict or module the key is empty.

    The names of the weights are those of the file. Sets under other keys than those of :data:`WRAPPERS` come last; a
    table of tensors of which none is called ``weight``, such as one of measurements, is no set of weights. Files of
    robustq have readers of their own and give none.
    """
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if is_bare_state_dict(content):
        return {"": dict(content)}
    found: dict[str, dict[str, Tensor]] = {}
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    if str(content.get("format") if keys else "").startswith("robustq-"):
        return found
    for key in [*(key for key in WRAPPERS if key in keys), *(key for key in keys if key not in WRAPPERS)]:
        inner = content.get(key)
        # Two levels are enough for {"model": {"state_dict": ...}}, and a dict that holds itself ends too.
        if isinstance(inner, dict) and not is_bare_state_dict(inner):
            inner = next((inner[name] for name in WRAPPERS if isinstance(inner.get(name), dict | nn.Module)), inner)
        if isinstance(inner, nn.Module):
            inner = inner.state_dict()
        if is_bare_state_dict(inner) and (key in WRAPPERS or any(name.endswith("weight") for name in inner)):
            found[key] = dict(inner)
    return found


def with_usual_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under torchvision's names, without prefixes and without entries that tools add."""
    state = {name: value for name, value in state.items() if not _is_extra(name)}
    heads = {name.removesuffix("conv1.weight") for name in state if name.endswith(".conv1.weight")}
    heads = {head for head in heads if head in PREFIXES and f"{head}fc.weight" in state}
    if len(heads) == 1:  # Lightning: the network is one part of the module, and a loss with weights another
        state = {name: value for name, value in state.items() if name.startswith(tuple(heads))}
    return _renamed(_without_prefixes(state))


def with_names_of(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names of ``network``, whose own may begin with ``net.`` or another of :data:`PREFIXES`.

    What tools add is left out, and counters of batches that are missing are the network's. Where the names do not fit,
    they are those of :func:`with_usual_names`.
    """
    own = network.state_dict()
    wanted = [name for name in own if not name.endswith(("log_threshold", COUNTER))]
    for candidate in (state, with_usual_names(state)):
        for named in _under_other_prefixes(candidate, wanted):
            if named.keys() >= set(wanted):
                counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
                extra = {name for name in named if _is_extra(name)} - own.keys()
                return {**counters, **{name: value for name, value in named.items() if name not in extra}}
    return with_usual_names(state)


def _under_other_prefixes(state: dict[str, Tensor], wanted: list[str]) -> Iterator[dict[str, Tensor]]:
    """``state`` as it is, its parts under one prefix, and all of it under the prefix that ``wanted`` share."""
    yield state
    last = wanted[0] if wanted else ""
    for prefix in [name.removesuffix(last) for name in state if name.endswith(f".{last}")]:
        yield {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in wanted):
            yield {f"{prefix}{name}": value for name, value in state.items()}


def _is_extra(name: str) -> bool:
    return name == "n_averaged" or name.rpartition(".")[2] in ("total_ops", "total_params")


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


THRESHOLD = "log_threshold"
"""Last part of the names of quantizers' learned scales."""

BUFFERS = ("running_mean", "running_var", COUNTER)
"""Last parts of the names of BatchNorm's buffers in a state dict."""


def count_parameters(network: nn.Module) -> int:
    """The parameters of a network, without buffers and quantizers' scales: one number at every bit width."""
    return sum(value.numel() for name, value in network.named_parameters() if not name.endswith(THRESHOLD))


def count_weights(state: dict[str, Tensor]) -> int:
    """The same of a state dict, by the names of its entries."""
    left_out = (*BUFFERS, THRESHOLD)
    return sum(value.numel() for name, value in state.items() if name.rpartition(".")[2] not in left_out)


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


def float_layers_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers of a quantized custom network that have no integer form, in their order."""
    meta = getattr(model, "meta", None)
    return tuple(meta.get(FLOAT_LAYERS, ())) if isinstance(meta, dict) else ()
