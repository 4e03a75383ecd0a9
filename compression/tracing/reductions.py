"""Norms, reductions, pooling: what computes statistics over axes. Over channels they couple them; over space they do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, together
from compression.tracing.rules import Call, Outcome, Rule, aten, barrier, first_tensor


def batch_norm(call: Call) -> Outcome:
    """Per-channel parameters and statistics follow the channels of axis 1."""
    label = call.label("input")
    if label is None:
        return barrier(call)
    vector = label.vector(1, call.record)
    call.record.unsized_norms[call.module] = vector
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is None:
            continue
        mark = call.mark(name)
        place = mark.along(0) if isinstance(mark, Coordinates) else None
        if isinstance(mark, Coordinates) and place is not None:
            call.record.tie(call.record.nodes(mark.name, place[0])[place[1]], vector)
        else:
            call.record.pin(vector, f"{call.where} takes a '{name}' that is computed")
    return [label, None, None]


def layer_norm(call: Call) -> Outcome:
    """The normalised axes couple their channels through their mean and variance: none can go."""
    label = call.label("input")
    if label is None:
        return barrier(call)
    first = len(label.shape) - len(call["normalized_shape"])
    if any(axis >= first for axis in label.axes):
        call.record.pin(label.ids, f"the layer norm {call.module} couples its channels through their mean and variance")
    return [label, None, None]


def group_norm(call: Call) -> Outcome:
    """A group's channels are coupled through their statistics: whole groups can go, unless there is only one."""
    label, groups, record = call.label("input"), call["group"], call.record
    if label is None:
        return barrier(call)
    vector = label.vector(1, record)
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            owned = call.owned(name)
            if owned is None:
                return barrier(call)
            record.tie(record.nodes(owned, 0), vector)
    if call.decide("one group", groups == 1):
        record.pin(vector, f"the group norm {call.module} couples all its channels through their mean and variance")
    else:
        by_group = vector.reshape(groups, -1)
        record.tie(by_group[:, :1], by_group)
    record.norm_groups[call.module] = (groups, vector)
    return [label, None, None]


def softmax(call: Call) -> Outcome:
    """Softmax over channels couples them."""
    return _unless_along(call, [call["dim"]], "couples the channels that it normalises")


def reduction(call: Call) -> Outcome:
    """Mean, sum, extremes over axes: over space channels pass; over channels they must stay."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    ndim = len(label.shape)
    dims = call.arguments.get("dim")
    dims = list(range(ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % ndim for dim in dims]
    ids = _over(call, label, dims, ndim == 4 and 1 not in dims)
    result = first_tensor(call.result)
    ids = ids.expand(torch.Size(1 if axis in dims else size for axis, size in enumerate(label.shape)))
    return ChannelLabel.of(ids.reshape(result.shape))


def _over(call: Call, label: ChannelLabel, dims: Sequence[int], spatial: bool) -> Tensor:
    """Return the nodes after something that mixes the positions along axes.

    Channels there must stay. But where pixels were made of channels (``spatial`` axes, and axis 1 has channels too),
    those that are mixed live or die together.
    """
    if any(dim in label.axes for dim in dims) and not (spatial and 1 in label.axes):
        call.record.pin(label.ids, f"{call.where} runs over channels")
    return together(label.ids, list(dims), call.record)


def resample(call: Call) -> Outcome:
    """Pooling, interpolation and padding over the last one, two or three axes, as the operation's name says."""
    label, result = call.label("self" if "self" in call.arguments else "input"), first_tensor(call.result)
    found = re.search(r"(\d)d", str(call.op.overloadpacket))
    if label is None or result.ndim != len(label.shape) or found is None:
        return barrier(call)
    space = int(found[1])
    ids = _over(call, label, range(result.ndim - space, result.ndim), result.ndim == space + 2)
    return ChannelLabel(ids, result.shape)


def _unless_along(call: Call, dims: Sequence[int], what: str) -> Outcome:
    label = call.label("self")
    if label is None:
        return barrier(call)
    if any(dim % len(label.shape) in label.axes for dim in dims):
        call.record.pin(label.ids, f"{call.where} {what}")
    return label


def restride(call: Call) -> Outcome:
    """Global pooling sets the strides of its result with it: that leaves the channels where they are."""
    mark, result = call.mark("self"), first_tensor(call.result)
    in_order = result.numel() == result.shape[1] and result.stride(1) == 1 if result.ndim == 4 else False
    return mark if isinstance(mark, ChannelLabel) and mark.shape == result.shape and in_order else barrier(call)


NORMS: dict[Any, Rule] = {
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training), batch_norm),
    **dict.fromkeys((aten.cudnn_batch_norm, aten.miopen_batch_norm), batch_norm),
    aten.native_layer_norm: layer_norm,
    aten.native_group_norm: group_norm,
}
REDUCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((aten._softmax, aten._log_softmax), softmax),
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean), reduction),
    **dict.fromkeys((aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d), resample),
    **dict.fromkeys((aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d), resample),
    **dict.fromkeys((aten.avg_pool1d, aten.max_pool1d, aten.mkldnn_max_pool2d), resample),
    **dict.fromkeys((aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d), resample),
    **dict.fromkeys((aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d), resample),
    **dict.fromkeys((aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d), resample),
    **dict.fromkeys((aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa), resample),
    **dict.fromkeys((aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d), resample),
    **dict.fromkeys((aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d), resample),
    aten.as_strided_: restride,
}
