"""torch's multi-head attention, computed so that whole heads can be cut out of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class HeadsAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads need not have all channels of its inputs between them.

    torch's own takes the size of a head from that of the inputs, so none can go. Self-attention without weights to return is
    computed here, from the same parameters; anything else is left to torch.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output, and None in place of its weights."""
        given = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
        plain = query is key is value and query.ndim == 3 and not given.get("need_weights", True)
        masked = given.get("key_padding_mask") is not None or given.get("attn_mask") is not None
        if not plain or masked or self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            return super().forward(query, key, value, *args, **kwargs)
        images = query if self.batch_first else query.transpose(0, 1)
        parts = F.linear(images, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout).transpose(1, 2).flatten(2)
        found = self.out_proj(seen)
        return found if self.batch_first else found.transpose(0, 1), None


def with_heads(model: nn.Module) -> nn.Module:
    """Have a network compute torch's multi-head attention by ``HeadsAttention``, in place."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = HeadsAttention
    return model
