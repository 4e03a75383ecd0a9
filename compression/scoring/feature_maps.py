"""Hand out a network's feature maps, as their readers see them, while it runs.

A *tap* is one tensor of a forward pass, found by counting operations (``tracer.computes``) as the trace did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compression.scoring.calibration import Calibration
from compression.tracing.graph import ChannelGraph
from compression.tracing.record import Contraction
from compression.tracing.rules import first_tensor
from compression.tracing.tracer import computes, evaluating
from utils import distributed

PASS = 16  # images of a forward pass: few enough that maps are scored while in the cache, and that processes share evenly


@dataclass(frozen=True)
class Tap:
    """A tensor that shows the channels of one contraction, or of several that are added up.

    Attributes:
        number: its running number among the computed tensors of a forward pass.
        name: "conv3": the third among the convolutions' taps, in forward order; "linear1" alike.
        weights: the weights whose channels it shows.
        channels: how many.
        spatial: whether it is a stack of maps [B, C, H, W]; else the last axis has the channels.
        positions: for each group that it shows units of, their channels, int64 [n].
        units: for each such group, the units at these channels, int64 [n].
    """

    number: int
    name: str
    weights: tuple[str, ...]
    channels: int
    spatial: bool
    positions: dict[str, Tensor]
    units: dict[str, Tensor]


def find_taps(graph: ChannelGraph) -> list[Tap]:
    """Return a network's taps in forward order: all of convolutions; of linear layers those that show a prunable group."""
    prunable = {group.name for group in graph.prunable}
    by_tap: dict[int, list[Contraction]] = {}
    for contraction in graph.contractions:
        by_tap.setdefault(contraction.tap, []).append(contraction)
    counts = {"conv": 0, "linear": 0}
    taps = []
    for number, contractions in by_tap.items():
        first = contractions[0]
        channels: dict[str, list[tuple[int, int]]] = {}  # group -> (position, unit)
        for position, node in enumerate(graph.component[first.out].tolist()):
            if node in graph.units:
                name, unit = graph.units[node]
                channels.setdefault(name, []).append((position, unit))
        kind = "conv" if first.spatial else "linear"
        if kind == "linear" and not prunable & set(channels):
            continue
        counts[kind] += 1
        columns = {name: torch.tensor(pairs).T for name, pairs in channels.items()}
        taps.append(
            Tap(
                number,
                name=f"{kind}{counts[kind]}",
                weights=tuple(dict.fromkeys(contraction.weight for contraction in contractions)),
                channels=len(first.out),
                spatial=first.spatial,
                positions={name: column[0] for name, column in columns.items()},
                units={name: column[1] for name, column in columns.items()},
            )
        )
    return taps


class _Enough(Exception):
    """Ends a forward pass after the last wanted tensor."""


class _Watch(TorchDispatchMode):
    """Counts computed tensors and shows the wanted ones at once, before a later operation can change them in place."""

    def __init__(self, wanted: Mapping[int, Tap], show: Callable[[Tap, Tensor], None]) -> None:
        super().__init__()
        self.wanted, self.show, self.computed, self.last = wanted, show, 0, max(wanted, default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if computes(func):
            self.computed += 1
            if (tap := self.wanted.get(self.computed)) is not None:
                self.show(tap, first_tensor(result))
            if self.computed == self.last:
                raise _Enough
        return result


def show_maps(model: nn.Module, inputs: Tensor, taps: Sequence[Tap], show: Callable[[Tap, Tensor], None]) -> None:
    """Run a network, up to the last tap, and hand each tap's maps [B, C, H, W] to ``show``, which must not keep them.

    The caller puts the network into eval mode (``evaluating``). Gradients are off.
    """

    def receive(tap: Tap, tensor: Tensor) -> None:
        show(tap, as_maps(tensor, tap, len(inputs)))

    watch = _Watch({tap.number: tap for tap in taps}, receive)
    with torch.no_grad(), suppress(_Enough), watch:
        model(inputs)


def as_maps(tensor: Tensor, tap: Tap, batch: int) -> Tensor:
    """View a tap's tensor as maps [B, C, H, W]; tokens [B, N, C] become squares where N is a square number."""
    if tap.spatial or tensor.shape[-1] != tap.channels:
        maps = tensor if tensor.ndim == 4 else tensor.reshape(batch, tap.channels, -1, 1)
    elif tensor.ndim == 4 and len(tensor) == batch:
        maps = tensor.permute(0, 3, 1, 2)
    else:
        tokens = tensor.reshape(batch, -1, tap.channels).transpose(1, 2)
        side = math.isqrt(tokens.shape[2])
        maps = tokens.unflatten(2, (side, side) if side * side == tokens.shape[2] else (-1, 1))
    if tuple(maps.shape[:2]) != (batch, tap.channels):
        raise RuntimeError(f"tap {tap.name} shows {tuple(tensor.shape)}, not {tap.channels} channels; a defect of ours")
    return maps.float()


class Measured(NamedTuple):
    """Values [K, images, C] of a tap's maps, and the maps' height and width."""

    values: Tensor
    size: tuple[int, int]


Statistic = Callable[[Tensor], Tensor]  # maps [B, C, H, W] -> values [K, B, C]


def measure_images(
    model: nn.Module, taps: Sequence[Tap], calibration: Calibration, statistic: Statistic, span: range
) -> dict[str, Measured]:
    """Measure the taps' maps of some images once; the processes share the passes.

    Args:
        model: on any device.
        span: which images of the calibration.

    Returns:
        What was measured by the taps' names, in the order of the images; the same on every process.
    """
    device = next(model.parameters()).device
    mine: dict[int, dict[str, Measured]] = {}
    part = replace(calibration, images=calibration.images[span.start : span.stop], labels=calibration.labels[span.start : span.stop])
    with evaluating(model):
        for number, (inputs, _) in deal(part):
            found: dict[str, Measured] = {}

            def keep(tap: Tap, maps: Tensor, found: dict[str, Measured] = found) -> None:
                found[tap.name] = Measured(statistic(maps).cpu(), (maps.shape[2], maps.shape[3]))

            show_maps(model, inputs.to(device), taps, keep)
            mine[number] = found
    batches = gather(mine)
    ordered = [batches[number] for number in sorted(batches)]
    return {t.name: Measured(torch.cat([batch[t.name].values for batch in ordered], 1), ordered[0][t.name].size) for t in taps}


def deal(calibration: Calibration) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield this process's share of the passes: (number, (inputs, labels))."""
    batches = replace(calibration, batch_size=PASS).batches()
    size, rank = distributed.world_size(), distributed.rank()
    return ((number, batch) for number, batch in enumerate(batches) if number % size == rank)


def gather(mine: dict[int, Any]) -> dict[int, Any]:
    """Return the union of all processes' numbered results, on every process."""
    if distributed.world_size() == 1:
        return mine
    shares: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(shares, mine)
    return {number: value for share in shares for number, value in share.items()}


def mean_over_images(model: nn.Module, graph: ChannelGraph, calibration: Calibration, statistic: Statistic) -> dict[str, Tensor]:
    """Return the mean over images of one statistic (K = 1) for each tap that shows a prunable group, float64 [C]."""
    prunable = {group.name for group in graph.prunable}
    taps = [tap for tap in find_taps(graph) if prunable & set(tap.units)]
    totals = {tap.name: torch.zeros(tap.channels, dtype=torch.float64) for tap in taps}
    for start in range(0, len(calibration), 16 * PASS):
        span = range(start, min(start + 16 * PASS, len(calibration)))
        for name, measured in measure_images(model, taps, calibration, statistic, span).items():
            totals[name] += measured.values[0].double().sum(0)
    return {name: total / len(calibration) for name, total in totals.items()}
