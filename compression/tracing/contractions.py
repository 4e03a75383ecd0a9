"""Convolutions and matrix products: they read channels and make new ones."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compression.tracing.attention import product_of_activations
from compression.tracing.channel_labels import ChannelLabel, Coordinates, strip
from compression.tracing.record import Contraction
from compression.tracing.rules import Call, NotFollowed, Outcome, Rule, aten


def convolution(call: Call) -> Outcome:
    """Read the channels of axis 1, make new ones; grouped convolutions tie by their structure."""
    record, label, weight, bias = call.record, call.label("input"), call.owned("weight"), None
    if call["bias"] is not None:
        bias = call.owned("bias")
    if weight is None or (call["bias"] is not None and bias is None) or call["weight"].ndim != call.result.ndim:
        raise NotFollowed("has a weight or bias that is computed")
    groups, transposed = call["groups"], call["transposed"]
    read = label.vector(1, record)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    record.producers.add((weight, out_dim))
    if not call.decide("grouped", groups > 1):
        record.readers.add((weight, in_dim))
        call.tie(record.nodes(weight, in_dim), read)
        out = record.nodes(weight, out_dim)
    else:
        out = _grouped(call, weight, read.view(groups, -1))
    if bias is not None:
        call.tie(record.nodes(bias, 0), out)
    spatial = call["input"] if transposed else call.result
    repeats = spatial.shape[0] * math.prod(spatial.shape[2:])
    record.contractions.append(Contraction(weight, call.module, out, read, groups, repeats, call.computed, call.result.ndim == 4))
    return ChannelLabel(out.view(1, -1, *[1] * (call.result.ndim - 2)), call.result.shape)


def _grouped(call: Call, weight: str, by_group: Tensor) -> Tensor:
    """Tie what a grouped convolution reads, [groups, channels of each], to its weight; return the channels that it makes."""
    record, (groups, per_group) = call.record, by_group.shape
    rows = record.nodes(weight, 0).view(groups, -1)
    if record.takes_whole_groups(weight, groups, per_group):
        call.tie(rows[:, :1], rows)
        call.tie(rows[:, :1], by_group)
        record.producers.add((weight, 0))
        return rows[:, :1].expand(groups, call.result.shape[1] // groups).reshape(-1)
    call.tie(by_group[:1], by_group)
    call.tie(rows[:1], rows)
    inside = record.nodes(weight, 1)
    read, made, in_dim = (rows[0], inside, 0) if call["transposed"] else (inside, rows[0], 1)
    record.readers.add((weight, in_dim))
    call.tie(read, by_group[0])
    return made.repeat(groups)


def matrix_product(call: Call) -> Outcome:
    """A (moved) weight matrix times an activation, on either side: mm, addmm, and bmm where the weight is one for all."""
    left, right = ("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")
    weight_first = isinstance(call.mark(right), ChannelLabel)
    label, weight = (call.mark(name) for name in ((right, left) if weight_first else (left, right)))
    matrix, record = call[left if weight_first else right], call.record
    bias = call["self"] if left == "mat1" else None
    owned_bias = call.owned("self") if bias is not None and bias.ndim == 1 and not weight_first else None
    scaled = call.arguments.get("alpha", 1) != 1 or call.arguments.get("beta", 1) != 1
    if isinstance(label, ChannelLabel) and isinstance(weight, ChannelLabel):
        return product_of_activations(call, [call.label(left), call.label(right)])
    if not isinstance(label, ChannelLabel) or not isinstance(weight, Coordinates) or (bias is not None and owned_bias is None) or scaled:
        raise NotFollowed
    reads, makes = (-1, -2) if weight_first else (-2, -1)
    rows, columns = weight.along(matrix.ndim + reads), weight.along(matrix.ndim + makes)
    one_for_all = matrix.ndim == 2 or all(strip(positions).shape[0] == 1 for positions in weight.positions)
    if rows is None or columns is None or rows[0] == columns[0] or not one_for_all:
        raise NotFollowed
    ndim = call.result.ndim
    read = label.vector(ndim - 2 if weight_first else ndim - 1, record)
    call.tie(record.nodes(weight.name, rows[0])[rows[1]], read)
    out = record.nodes(weight.name, columns[0])[columns[1]]
    record.producers.add((weight.name, columns[0]))
    record.readers.add((weight.name, rows[0]))
    if owned_bias is not None:
        call.tie(record.nodes(owned_bias, 0), out)
    repeats = call.result.numel() // len(out)
    record.contractions.append(Contraction(weight.name, call.module, out, read, 1, repeats, call.computed, False))
    return ChannelLabel(out.view(*[1] * (ndim - 2), *((-1, 1) if weight_first else (1, -1))), call.result.shape)


CONTRACTIONS: dict[Any, Rule] = {
    aten.convolution: convolution,
    aten.mm: matrix_product,
    aten.addmm: matrix_product,
    aten.bmm: matrix_product,
}
