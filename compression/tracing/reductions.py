"""Norms, reductions, pooling: statistics over axes. Those over channels couple them; those over space do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, tie_along
from compression.tracing.rules import Call, NotFollowed, Outcome, Rule, aten, first_tensor


def batch_norm(call: Call) -> Outcome:
    """Per-channel parameters and statistics follow the channels of axis 1."""
    label = call.label("input")
    channels = label.vector(1, call.record)
    call.record.norm_groups[call.module] = (len(channels), channels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is None:
            continue
        mark = call.mark(name)
        origin = mark.along(0) if isinstance(mark, Coordinates) else None
        if isinstance(mark, Coordinates) and origin is not None:
            call.tie(call.record.nodes(mark.name, origin[0])[origin[1]], channels)
        else:
            call.pin(channels, f"takes a '{name}' that is computed")
    return [label, None, None]


def layer_norm(call: Call) -> Outcome:
    """The normalised axes couple their channels through their mean and variance: none can go."""
    label = call.label("input")
    first = len(label.shape) - len(call["normalized_shape"])
    if any(axis >= first for axis in label.axes):
        call.record.pin(label.ids, f"the layer norm {call.module} couples its channels through their mean and variance")
    return [label, None, None]


def group_norm(call: Call) -> Outcome:
    """A group's channels are coupled through their statistics: whole groups can go, unless there is only one."""
    label, groups, record = call.label("input"), call["group"], call.record
    channels = label.vector(1, record)
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            owned = call.owned(name)
            if owned is None:
                raise NotFollowed
            call.tie(record.nodes(owned, 0), channels)
    if call.decide("one group", groups == 1):
        record.pin(channels, f"the group norm {call.module} couples all its channels through their mean and variance")
    else:
        by_group = channels.reshape(groups, -1)
        call.tie(by_group[:, :1], by_group)
    record.norm_groups[call.module] = (groups, channels)
    return [label, None, None]


def softmax(call: Call) -> Outcome:
    """Softmax over channels couples them."""
    label = call.label("self")
    if call["dim"] % len(label.shape) in label.axes:
        call.pin(label.ids, "couples the channels that it normalises")
    return label


def reduction(call: Call) -> Outcome:
    """Mean, sum, extremes: those over space let channels pass, those over channels make them stay."""
    label = call.label("self")
    ndim, dims = len(label.shape), call.arguments.get("dim")
    dims = list(range(ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    dims = [dim % ndim for dim in dims]
    ids = _mixed(call, label, dims, ndim == 4 and 1 not in dims)
    ids = ids.expand(torch.Size(1 if axis in dims else size for axis, size in enumerate(label.shape)))
    return ChannelLabel.of(ids.reshape(first_tensor(call.result).shape))


def resample(call: Call) -> Outcome:
    """Pooling, interpolation and padding over the last one, two or three axes, as the operation's name says."""
    label, result = call.label("self" if "self" in call.arguments else "input"), first_tensor(call.result)
    found = re.search(r"(\d)d", str(call.op.overloadpacket))
    if result.ndim != len(label.shape) or found is None:
        raise NotFollowed
    space = int(found[1])
    return ChannelLabel(_mixed(call, label, range(result.ndim - space, result.ndim), result.ndim == space + 2), result.shape)


def _mixed(call: Call, label: ChannelLabel, dims: Sequence[int], spatial: bool) -> Tensor:
    """Return the nodes after something that mixes the positions along axes.

    Channels there must stay. But where pixels were made of channels (``spatial`` axes, and axis 1 has channels too),
    those that are mixed live or die together.
    """
    if any(dim in label.axes for dim in dims) and not (spatial and 1 in label.axes):
        call.pin(label.ids, "runs over channels")
    return tie_along(label.ids, dims, call.record)


def restride(call: Call) -> Outcome:
    """Global pooling sets its result's strides by this, which leaves the channels where they are."""
    label, result = call.label("self"), first_tensor(call.result)
    in_order = result.ndim == 4 and result.numel() == result.shape[1] and result.stride(1) == 1
    if label.shape != result.shape or not in_order:
        raise NotFollowed
    return label


NORMS: dict[Any, Rule] = {
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training), batch_norm),
    **dict.fromkeys((aten.cudnn_batch_norm, aten.miopen_batch_norm), batch_norm),
    aten.native_layer_norm: layer_norm,
    aten.native_group_norm: group_norm,
}
_RESAMPLING = (
    *(aten.avg_pool1d, aten.max_pool1d, aten.max_pool2d_with_indices, aten.mkldnn_max_pool2d, aten.avg_pool2d),
    *(aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool3d_with_indices, aten.avg_pool3d),
    *(aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
    *(aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d),
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
    *(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
)
REDUCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((aten._softmax, aten._safe_softmax, aten._log_softmax), softmax),
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean), reduction),
    aten.linalg_vector_norm: reduction,
    **dict.fromkeys(_RESAMPLING, resample),
    aten.as_strided_: restride,
}
