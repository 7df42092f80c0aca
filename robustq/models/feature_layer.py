"""Which layer of a network the features enter that ODG-Q aligns."""

from __future__ import annotations

from torch import nn

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
