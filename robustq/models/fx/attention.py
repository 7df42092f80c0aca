"""torch's MultiheadAttention as a module with one output, for graphs."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from brevitas.backport.fx import GraphModule
from brevitas.graph.utils import set_module
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.fx.trace import called_module, describe


class Attention(nn.MultiheadAttention):
    """The values of an nn.MultiheadAttention, without its weights of attention; parameters keep their names."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """As of nn.MultiheadAttention; its first result."""
        options["need_weights"] = False
        plain = query is key is value and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        masked = any(options.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        if torch.jit.is_tracing() and plain and not masked:  # type: ignore[attr-defined,no-untyped-call]
            return self._with_fixed_shapes(query)
        values: Tensor = super().forward(query, key, value, **options)[0]
        return values

    def _with_fixed_shapes(self, x: Tensor) -> Tensor:
        """The same for export: torch's own form computes shapes at run time."""
        x = x if self.batch_first else x.transpose(0, 1)
        length, width = int(x.shape[1]), self.embed_dim
        parts = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        parts = parts.reshape(-1, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        values: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(-1, length, width))
        return values if self.batch_first else values.transpose(0, 1)


def attention_to_values(model: GraphModule) -> None:
    """Replace each nn.MultiheadAttention and the choice of its first result by :class:`Attention`.

    UsageError where its second result, the weights of attention, is used.
    """
    for node in list(model.graph.nodes):
        attention = called_module(model, node)
        if not isinstance(attention, nn.MultiheadAttention) or isinstance(attention, Attention):
            continue
        for user in list(node.users):
            is_choice = user.target is operator.getitem
            if is_choice and not user.users:
                model.graph.erase_node(user)
                continue
            if not is_choice or user.args[1] != 0:
                raise UsageError(f"{describe(model, node)} gives its weights of attention too; use its values alone")
            user.replace_all_uses_with(node)
            model.graph.erase_node(user)
        values = copy.copy(attention)
        values.__class__ = Attention
        set_module(model, values, str(node.target))
    model.recompile()
