"""Norms, reductions, pooling: what computes statistics over axes. Over channels they couple them; over space they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compression.labels import Coordinates, Label, together
from compression.rules import Call, Outcome, Rule, aten, barrier, first_tensor


def batch_norm(call: Call) -> Outcome:
    """Per-channel parameters and statistics follow the channels of axis 1."""
    label = call.label("input")
    if label is None:
        return barrier(call)
    vector = label.vector(1, call.ledger)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is None:
            continue
        mark = call.mark(name)
        place = mark.along(0) if isinstance(mark, Coordinates) and call[name].numel() > 1 else None
        if isinstance(mark, Coordinates) and mark.direct:
            call.ledger.tie(call.ledger.nodes(mark.name, 0), vector)
        elif isinstance(mark, Coordinates) and place is not None:
            call.ledger.tie(call.ledger.nodes(mark.name, place[0])[place[1]], vector)
        else:
            call.ledger.pin(vector, f"{call.where} takes a '{name}' that is computed")
    return [label, None, None]


def layer_norm(call: Call) -> Outcome:
    """The normalised axes couple their channels through their mean and variance: none can go."""
    label = call.label("input")
    if label is None:
        return barrier(call)
    first = len(label.shape) - len(call["normalized_shape"])
    if any(axis >= first for axis in label.axes):
        call.ledger.pin(label.ids, f"the layer norm {call.module} couples its channels through their mean and variance")
    return [label, None, None]


def group_norm(call: Call) -> Outcome:
    """A group's channels are coupled through their statistics: whole groups can go, unless there is only one."""
    label, groups, ledger = call.label("input"), call["group"], call.ledger
    if label is None:
        return barrier(call)
    vector = label.vector(1, ledger)
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            owned = call.owned(name)
            if owned is None:
                return barrier(call)
            ledger.tie(ledger.nodes(owned, 0), vector)
    if groups == 1:
        ledger.pin(vector, f"the group norm {call.module} couples all its channels through their mean and variance")
    else:
        by_group = vector.reshape(groups, -1)
        ledger.tie(by_group[:, :1], by_group)
    ledger.norm_groups[call.module] = (groups, vector)
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
    over_space = ndim == 4 and min(dims) >= 2
    if not over_space and any(dim in label.axes for dim in dims):
        call.ledger.pin(label.ids, f"{call.where} runs over channels")
    ids = together(label.ids, dims, call.ledger)
    result = first_tensor(call.result)
    ids = ids.expand(torch.Size(1 if axis in dims else size for axis, size in enumerate(label.shape)))
    outcome = Label.of(ids.reshape(result.shape))
    return [outcome] * len(call.result) if isinstance(call.result, tuple) else outcome


def resample(call: Call) -> Outcome:
    """Pooling and interpolation over the axes behind the channels."""
    label, result = call.label("self" if "self" in call.arguments else "input"), first_tensor(call.result)
    if label is None or result.ndim != len(label.shape):
        return barrier(call)
    kept = 2 if result.shape[:2] == label.shape[:2] else 1
    ids = together(label.ids, list(range(kept, result.ndim)), call.ledger)
    outcome = Label(ids, result.shape)
    return [outcome] * len(call.result) if isinstance(call.result, tuple) else outcome


def _unless_along(call: Call, dims: Sequence[int], what: str) -> Outcome:
    label = call.label("self")
    if label is None:
        return barrier(call)
    if any(dim % len(label.shape) in label.axes for dim in dims):
        call.ledger.pin(label.ids, f"{call.where} {what}")
    return label


def same(call: Call) -> Outcome:
    """The channels stay where they are."""
    mark = call.mark(next(iter(call.arguments)))
    result = first_tensor(call.result)
    return mark if isinstance(mark, Label) and mark.shape == result.shape else barrier(call)


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
    **dict.fromkeys((aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d), resample),
    **dict.fromkeys((aten.reflection_pad2d, aten.replication_pad2d), resample),
    aten.as_strided_: same,  # pooling restores strides with it
}
