"""Attention: queries, keys and values meet in products of activations, so the channels of a head live or die together.

Heads are an axis into which a ``view`` splits the channels. It shows only where the products are taken that it does; that
site is then asked for whole heads (see ``channels.trace``). Their number may be an attribute of the module, as in ``num_heads``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from compression.tracing.channel_labels import ChannelLabel, Coordinates, tie_along
from compression.tracing.rules import Call, NotFollowed, Outcome, Rule, aten, tie_parameter

MIXES = "multiplies activations with each other"


def split_into_heads(call: Call, moved: ChannelLabel) -> ChannelLabel:
    """Tie channels that were split over axes [.., heads, channels of one], but for the axis of the heads."""
    axes = call.decide("split axes", sorted(moved.axes))
    head = axes[-2]
    call.record.splits[call.key] = torch.unique(moved.ids), moved.shape[axes[-1]]
    ids = tie_along(moved.ids, [axis for axis in axes if axis != head], call.record)
    call.record.head_counts[call.module] = moved.shape[head], ids.reshape(-1)
    return ChannelLabel(ids, moved.shape)


def product_of_activations(call: Call, factors: Sequence[ChannelLabel]) -> ChannelLabel:
    """Multiply matrices of activations: those at equal places of the leading axes are tied.

    Args:
        factors: two matrices [.., rows, inner] and [.., inner, columns]; or queries, keys and values of a fused attention.

    Raises:
        NotFollowed: their channels lie along rows or columns.
    """
    first, leading = factors[0], range(call.result.ndim - 2)
    along_heads = all(factor.axes == first.axes for factor in factors) and first.axes and all(axis in leading for axis in first.axes)
    if not call.decide("by heads", bool(along_heads)):
        for factor in factors:
            for axis in factor.axes - set(leading):
                call.record.ask_for_heads(torch.unique(factor.ids), factor.shape[axis])
        raise NotFollowed(MIXES)
    for factor in factors[1:]:
        call.tie(factor.ids, first.ids)
    rows, columns = factors[0].shape[-2], factors[1].shape[-1 if len(factors) == 2 else -2]
    each = sum(first.shape[:-2].numel() * rows * columns * factor.shape[-1] for factor in factors[::2]) // first.ids.numel()
    call.record.products.append((first.ids.reshape(-1), each))
    return ChannelLabel(first.ids, call.result.shape)


def scaled_dot_product(call: Call) -> Outcome:
    """Fused attention of queries, keys and values [B, heads, positions, channels], with a bias or mask of the heads."""
    bias = next((call[name] for name in ("attn_mask", "attn_bias") if call.arguments.get(name) is not None), None)
    label = product_of_activations(replace(call, result=call.result[0]), [call.label(name) for name in ("query", "key", "value")])
    mark = None if bias is None else call.marks.get(id(bias))
    if isinstance(mark, ChannelLabel):
        raise NotFollowed(MIXES)
    if bias is not None and isinstance(mark, Coordinates):
        tie_parameter(call, bias, mark, label.ids)
    elif bias is not None and bias.ndim == 4 and bias.shape[1] > 1:
        call.pin(label.ids, "combines it with a tensor of a fixed size")
    return [label, *[None] * (len(call.result) - 1)]


ATTENTION: dict[Any, Rule] = dict.fromkeys(
    (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    ),
    scaled_dot_product,
)
