"""Convolutions and matrix products: they read channels and make new ones."""

from __future__ import annotations

from typing import Any

import torch

from compression.tracing.channel_labels import ChannelLabel, Coordinates, strip
from compression.tracing.record import Contraction
from compression.tracing.rules import Call, Outcome, Rule, aten, barrier


def convolution(call: Call) -> Outcome:
    """Read the channels of axis 1, make new ones; grouped convolutions tie by their structure."""
    record, weight, bias = call.record, call.owned("weight"), call.owned("bias") if call["bias"] is not None else None
    label = call.label("input")
    unexpected = call["bias"] is not None and bias is None
    if label is None or weight is None or unexpected or call["weight"].ndim != call.result.ndim:
        return barrier(call) if label is None else barrier(call, "has a weight or bias that is computed")
    groups, transposed = call["groups"], call["transposed"]
    read = label.vector(1, record)
    c_in, c_out = len(read), call.result.shape[1]
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    record.producers.add((weight, out_dim))
    if not call.decide("grouped", groups > 1):
        record.readers.add((weight, in_dim))
        record.tie(record.nodes(weight, in_dim), read)
        out = record.nodes(weight, out_dim)
    else:
        by_group = read.view(groups, c_in // groups)
        if record.takes_whole_groups(weight, groups, c_in // groups):
            rows = record.nodes(weight, 0).view(groups, -1)
            record.tie(rows[:, :1], rows)
            record.tie(rows[:, :1], by_group)
            out = rows[:, :1].expand(groups, c_out // groups).reshape(-1)
            record.producers.add((weight, 0))
        else:
            record.tie(by_group[:1], by_group)
            rows = record.nodes(weight, 0).view(groups, -1)
            record.tie(rows[:1], rows)
            inside = record.nodes(weight, 1)
            record.readers.add((weight, in_dim))
            record.tie(rows[0] if transposed else inside, by_group[0])
            out = (inside if transposed else rows[0]).repeat(groups)
    if bias is not None:
        record.tie(record.nodes(bias, 0), out)
    spatial = call["input"] if transposed else call.result
    repeats = spatial.shape[0] * int(torch.tensor(spatial.shape[2:]).prod())
    record.contractions.append(Contraction(weight, call.module, out, read, groups, repeats, call.computed, call.result.ndim == 4))
    return ChannelLabel(out.view(1, -1, *[1] * (call.result.ndim - 2)), call.result.shape)


MIXES = "multiplies activations with each other"


def attention(call: Call) -> Outcome:
    """Queries, keys and values meet in products of activations: their channels stay."""
    return barrier(call, MIXES)


def matrix_product(call: Call) -> Outcome:
    """A (moved) weight matrix times an activation, on either side: mm, addmm, and bmm where the weight is one for all."""
    left, right = ("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")
    bias = call["self"] if left == "mat1" else None
    behind = call.label(right) is not None  # the weight stands before the activation
    label, weight, record = call.label(right if behind else left), call.mark(left if behind else right), call.record
    matrix = call[left if behind else right]
    scaled = call.arguments.get("alpha", 1) != 1 or call.arguments.get("beta", 1) != 1
    owned_bias = call.owned("self") if bias is not None and bias.ndim == 1 and not behind else None
    if label is not None and isinstance(weight, ChannelLabel):
        return barrier(call, MIXES)
    if label is None or not isinstance(weight, Coordinates) or (bias is not None and owned_bias is None) or scaled:
        return barrier(call)
    reads, makes = (-1, -2) if behind else (-2, -1)
    rows, columns = weight.along(matrix.ndim + reads), weight.along(matrix.ndim + makes)
    one_for_all = matrix.ndim == 2 or all(strip(place).shape[0] == 1 for place in weight.places)
    if rows is None or columns is None or rows[0] == columns[0] or not one_for_all:
        return barrier(call)
    ndim = call.result.ndim
    read = label.vector(ndim - 2 if behind else ndim - 1, record)
    record.tie(record.nodes(weight.name, rows[0])[rows[1]], read)
    out = record.nodes(weight.name, columns[0])[columns[1]]
    record.producers.add((weight.name, columns[0]))
    record.readers.add((weight.name, rows[0]))
    if owned_bias is not None:
        record.tie(record.nodes(owned_bias, 0), out)
    repeats = call.result.numel() // len(out)
    record.contractions.append(Contraction(weight.name, call.module, out, read, 1, repeats, call.computed, False))
    return ChannelLabel(out.view(*[1] * (ndim - 2), *((-1, 1) if behind else (1, -1))), call.result.shape)


CONTRACTIONS: dict[Any, Rule] = {
    aten.convolution: convolution,
    aten.mm: matrix_product,
    aten.addmm: matrix_product,
    aten.bmm: matrix_product,
}
ATTENTION: dict[Any, Rule] = dict.fromkeys(
    (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    ),
    attention,
)
